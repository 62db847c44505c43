"""The programs of a hardware cluster share one row: they exchange partial sums through each other's shared memory.

Every program loads its chunk once, in pieces of one or two vectors a thread, and keeps it in registers. The programs of a cluster run at
the same time on neighbouring SMs, and each stores its sum of squares straight into the shared memory of all the others; one cluster
barrier later everybody adds up the same sums in the same order. No memory is touched but x, w and y. For a few rows of 16384 to 65536
columns that is up to 12 % faster than `split_row`, which exchanges its sums through L2 (H100).

Triton's language has no such store, so two pieces of inline PTX do it. The kernel is compiled as if its programs were independent, and
`kernels/launch.py` starts them in clusters. `triton.autotune` declares the space here; what it would launch has no clusters, and traps.

NVIDIA only, from compute capability 9.0. A cluster starts whole or not at all, so there is no deadlock, and a program leaves only after
the last store into its shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kernels.variants.common import (
    ROW_INTEGERS,
    align_elements,
    full_pieces,
    has_two_strides,
    held_bytes_fit,
    keep_packed,
    load_chunk,
    load_piece,
    prune_configs,
    row_start,
    scaled,
    store_piece,
    sums_of_all_chunks,
)
from tuning_db.model import FORWARD, Device, Problem

OPS = (FORWARD,)
REVISION = 1  # to be raised with the PTX below as well, which the source hash does not cover
LAYOUTS = ("contiguous", "two_stride")
IN_PLACE = True  # every program has read its chunk before it writes it, and nobody else reads that

ARCHES = ("sm_90", "sm_100", "sm_103")
"""With clusters of 16 programs; the consumer boards of compute capability 12.0 have at most 8."""

TRITON_STARTS_CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
"""Whether the launcher can ask this Triton for them: the form of a kernel's packed metadata, read in the source of 3.6 and 3.9."""

MAX_COLS = 2**16
MAX_ROWS = 64
"""Clusters start late (0.4 µs on an H100) and leave SMs idle: for many or wider rows `split_row` is faster, 5 % at 1024 × 131072."""

ENTER = tl.constexpr("barrier.cluster.arrive.relaxed.aligned; mov.u32 $0, 0;")
"""Says that this program runs, so that others may write to its shared memory. Waited for right before anybody does."""


def cluster_sum_ptx(cluster: int) -> str:
    """PTX for $0 = the sum of every program's $1, in the order of their ranks: the same bits in each.

    Thread t < cluster stores $1 into slot `rank` of program t. PTX ISA: `mapa`, `st.shared::cluster`, `barrier.cluster`.
    """
    additions = "\n        ".join(f"ld.shared.f32 slot, [slots+{4 * rank}]; add.rn.f32 $0, $0, slot;" for rank in range(cluster))
    return f"""{{
        .shared .align 16 .b32 slots[{cluster}];
        .reg .pred is_sender, is_alone;
        .reg .b32 thread, rank, size, address;
        .reg .f32 slot;
        mov.u32 thread, %tid.x;
        setp.lt.u32 is_sender, thread, {cluster};
        mov.u32 size, %cluster_nctarank;
        setp.ne.u32 is_alone, size, {cluster};
        @is_alone trap;
        mov.u32 rank, %cluster_ctarank;
        mov.u32 address, slots;
        mad.lo.u32 address, rank, 4, address;
        barrier.cluster.wait.aligned;
        @is_sender mapa.shared::cluster.u32 address, address, thread;
        @is_sender st.shared::cluster.f32 [address], $1;
        barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned;
        mov.f32 $0, 0f00000000;
        {additions}
    }}"""


SUM_OF_4, SUM_OF_8, SUM_OF_16 = (tl.constexpr(cluster_sum_ptx(cluster)) for cluster in (4, 8, 16))


@triton.jit
def cluster_sum(value, CLUSTER: tl.constexpr):
    """The sum over the programs of the cluster. Every program calls it once, after ENTER."""
    tl.static_assert(CLUSTER == 4 or CLUSTER == 8 or CLUSTER == 16)
    if CLUSTER == 4:
        return tl.inline_asm_elementwise(SUM_OF_4, "=&f,f", [value], dtype=tl.float32, is_pure=False, pack=1)
    elif CLUSTER == 8:
        return tl.inline_asm_elementwise(SUM_OF_8, "=&f,f", [value], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise(SUM_OF_16, "=&f,f", [value], dtype=tl.float32, is_pure=False, pack=1)


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    cluster, block_cols, num_warps = params["cluster"], params["block_cols"], params["num_warps"]
    if not TRITON_STARTS_CLUSTERS or device.arch not in ARCHES:
        return False
    if problem.layout not in LAYOUTS or problem.cols > MAX_COLS or problem.rows > MAX_ROWS:
        return False
    if problem.cols < cluster * block_cols:
        return False  # idle threads
    pieces = -(-problem.cols // (cluster * block_cols))
    return held_bytes_fit(pieces * block_cols, problem, weight_first=True, num_warps=num_warps, warp_size=device.warp_size)


@triton.autotune(
    configs=[
        triton.Config({"CLUSTER": cluster, "BLOCK_COLS": 256 * num_warps}, num_warps=num_warps)
        for cluster in (4, 8, 16)
        for num_warps in (4, 8)
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid),
)
@triton.heuristics(
    {
        "PIECES": lambda args: -(-args["cols"] // (args["CLUSTER"] * args["BLOCK_COLS"])),
        "ALIGN": align_elements,
        "FULL_PIECES": lambda args: full_pieces(args, args["CLUSTER"]),
        "TWO_STRIDE": has_two_strides,
    }
)
@triton.jit(do_not_specialize=[*ROW_INTEGERS])
def cluster_row_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    eps: tl.float32,
    rows: tl.int64,
    cols: tl.int32,
    row_divisor: tl.int64,
    x_skip: tl.int64,
    x_row_stride: tl.int64,
    y_skip: tl.int64,
    y_row_stride: tl.int64,
    PTX: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_NORMALIZED: tl.constexpr,
    CLUSTER: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL_PIECES: tl.constexpr,
    TWO_STRIDE: tl.constexpr,
):
    if PTX:
        tl.inline_asm_elementwise(ENTER, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    part = tl.program_id(0) % CLUSTER  # the program's rank in its cluster
    row = (tl.program_id(0) // CLUSTER).to(tl.int64)
    x_row_ptr = row_start(x_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE)
    y_row_ptr = row_start(y_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
    chunk = PIECES * BLOCK_COLS
    if FULL_PIECES < PIECES:  # near-equal chunks, each starting on an aligned column, as in full_pieces
        chunk = tl.cdiv(tl.cdiv(cols, CLUSTER), ALIGN) * ALIGN
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    inverse_cols = 1.0 / cols  # while the loads are under way: a division behind the reduction costs 0.05 µs of 2 (H100)

    start = part * chunk
    end = tl.minimum(start + chunk, cols) // ALIGN * ALIGN
    weights = ()
    if HAS_WEIGHT:
        for i in tl.static_range(PIECES):
            weights = weights + (load_piece(w_ptr, start + i * BLOCK_COLS, end, BLOCK_COLS, i >= FULL_PIECES),)
    pieces, partial = load_chunk(x_row_ptr, None, start, end, BLOCK_COLS, PIECES, FULL_PIECES)
    if PTX:
        squares = cluster_sum(partial, CLUSTER)
    else:  # Triton's interpreter, which runs one program after another
        squares = tl.sum(sums_of_all_chunks(x_row_ptr, None, chunk, CLUSTER, cols, CLUSTER, ALIGN, BLOCK_COLS, PIECES, FULL_PIECES))
    rstd = tl.rsqrt(squares * inverse_cols + eps)
    for i in tl.static_range(PIECES):
        at = start + i * BLOCK_COLS
        w = pieces[i]
        if HAS_WEIGHT:
            w = weights[i]
        y = scaled(keep_packed(pieces[i], PTX), w, rstd, HAS_WEIGHT, WEIGHT_OFFSET, ROUND_NORMALIZED, y_ptr.dtype.element_ty)
        store_piece(y_row_ptr, y, at, end, BLOCK_COLS, i >= FULL_PIECES)


kernel = cluster_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (args["rows"] * args["CLUSTER"], 1, 1)
