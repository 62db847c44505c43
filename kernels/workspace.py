"""Zeroed device memory for kernels whose programs wait for each other: one piece a stream, and one a stream of each captured graph.

Kernels on one stream run one after another, so they share a piece. A graph may be replayed on any stream at any time, beside other
graphs, so each gets memory that nobody else ever uses. That memory is cut from a slab zeroed outside of captures; where no slab has
room (or the very first call is a captured one) the piece is allocated and zeroed within the graph, which adds a node to it.

What is allocated outside of captures comes from no private memory pool, though the call may run in one: Inductor warms up its CUDA
graphs in a pool of their own, whose memory it takes back, and raises where something in it lives on.

Pieces are also separate for each way to use them (`use`: how many programs share a row, and for a backward that it is one), because the
kernels go by what their last launch left there.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from kernels.device import capture_id

SLAB_WORDS = 1 << 18
"""2 MiB a GPU. A graph of decode calls (16 rows, split in 8) takes 640 bytes of it, however many calls it holds."""

MIN_WORDS = 1 << 10


@dataclass
class _Slab:
    memory: torch.Tensor
    used: int = 0


@dataclass
class _Capture:
    """The pieces of the capture that a stream is in, or was in last."""

    identity: int | None
    pieces: dict[Hashable, torch.Tensor] = field(default_factory=dict)


_by_stream: dict[tuple[int, int, Hashable], torch.Tensor] = {}
_captures: dict[tuple[int, int], _Capture] = {}
_slabs: dict[int, _Slab] = {}
_retired: list[torch.Tensor] = []  # used slabs, which captured graphs point into, and outgrown pieces; at most as much again as is used
_slab_lock = threading.Lock()  # taken where a slab is cut or replaced, never by a usual call


def workspace(device_index: int, stream: int, use: Hashable, words: int) -> torch.Tensor:
    """At least `words` 64-bit words, zero or as the last launch of that use left them, for one on `stream` of the current device."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return _captured(device_index, stream, use, words)
    piece = _by_stream.get((device_index, stream, use))
    if piece is None or piece.numel() < words:
        if piece is not None:
            _retired.append(piece)  # another thread may be about to launch with it
        piece = _pooled_by_none(device_index, max(MIN_WORDS, 1 << (words - 1).bit_length()))
        _by_stream[(device_index, stream, use)] = piece
    slab = _slabs.get(device_index)
    if slab is None or slab.used > SLAB_WORDS // 2:
        _refill_slab(device_index)
    return piece


def _captured(device_index: int, stream: int, use: Hashable, words: int) -> torch.Tensor:
    identity = capture_id(stream)
    capture = _captures.get((device_index, stream))
    if capture is None or identity is None or capture.identity != identity:
        capture = _captures[(device_index, stream)] = _Capture(identity)
    piece = capture.pieces.get(use)
    if piece is None or piece.numel() < words:
        piece = capture.pieces[use] = _cut(device_index, words)
    return piece


def _cut(device_index: int, words: int) -> torch.Tensor:
    words = -(-words // 16) * 16  # every pointer that a kernel gets is a multiple of 16 bytes
    with _slab_lock:
        slab = _slabs.get(device_index)
        if slab is not None and slab.used + words <= SLAB_WORDS:
            start, slab.used = slab.used, slab.used + words
            return slab.memory[start : slab.used]
    return _zeros(device_index, words)


def _refill_slab(device_index: int) -> None:
    """A slab with room for the captures to come. Not under capture."""
    memory = _pooled_by_none(device_index, SLAB_WORDS)
    torch.cuda.current_stream(device_index).synchronize()  # zeroed before a graph on any other stream uses it
    with _slab_lock:
        if device_index in _slabs:
            _retired.append(_slabs[device_index].memory)
        _slabs[device_index] = _Slab(memory)


def _pooled_by_none(device_index: int, words: int) -> torch.Tensor:
    """Zeros for the current stream, from the allocator's common memory: a private pool is entered by a thread, and this one is new."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        memory = thread.submit(_zeros, device_index, words).result()
    torch.cuda.current_stream(device_index).wait_stream(torch.cuda.default_stream(device_index))  # where a new thread zeroes
    return memory


def _zeros(device_index: int, words: int) -> torch.Tensor:
    return torch.zeros(words, dtype=torch.int64, device=f"cuda:{device_index}")
