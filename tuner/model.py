"""An analytic estimate of a config's time from its binary's resources, for GPUs that nobody has measured.

A program's own time is what it waits for one after the other: data, the arithmetic of a thread, the sums of its warps, the exchange with
other programs. So many programs run at once as registers, threads and shared memory of the SMs allow, the others in waves after them.
Memory moves the bytes of all of them meanwhile, and starting a program costs its SM a little. The estimate is the launch and the root
of the sum of squares of these three times: the largest decides, with rounded corners.

The programs of a backward walk the rows: all that is in turns, of a row or a tile of rows each, as many as the program with most of them
takes. A pipelined loop has stages - 1 turns' rows under way. With two stages the next load starts when the rows before have left the
one buffer, which hides nothing; with three it has a turn's time. Programs that share rows wait in each turn for the sums of the others,
however soon the data come. Partial rows of dw are written and read on top of the rest.

The constants are fitted to the trials of an H100's sweep alone, but for LAUNCH_US and COPY_EFFICIENCY, which are measured. On the
default workload `python -m tuner regret` finds the picks of the forward 1.5 % slower than the fastest config in the geometric mean and
6.9 % at p95 on an H100, 2.3 % and 9.4 % on an H200, which the fit never saw; those of the backward 1.0 % and 6.5 %, 0.5 % and 3.6 %.
Fitted to one half of the H100's problems, they lose 2.2 to 2.5 % and 9 % on the other forward, 0.9 to 1.6 % and 4 to 5 % backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from kernels.geometry import geometry_of_problem
from kernels.launch import kernel_arguments
from kernels.variants import VARIANTS
from kernels.variants.common import VECTOR_BYTES
from tuner.architectures import Architecture
from tuning_db.model import NO_WEIGHT, Config, Device, Measurement, Problem, Resources, itemsize

POLICY = "model-3"

LAUNCH_US = 1.0
"""An empty kernel in a graph; H100."""
COPY_EFFICIENCY = 0.92
"""Of the published bandwidth, what a large copy reaches; H100."""
LATENCY_US = 0.3
"""From a program's loads to the data in its registers."""
THREAD_ELEMENT_US = 0.011
"""What each element of a thread adds in a forward: load, square, scale, store, with the other programs of the SM at work."""
WARPS_SUM_US = 0.15
"""What each doubling of the warps adds: they wait for each other to sum up."""
PROGRAM_US = 0.075
"""What starting a program costs its SM, whatever the program does."""
LATE_WEIGHT_US = 0.22
"""Loading the weight after the reduction, a second latency."""
SHARE_US = 0.52
"""Programs that share a row exchange their sums through L2: one write, one read."""
SHARER_US = 0.0025
"""What each program of a row adds to that, for each reads the sums of all."""
CLUSTER_US = 0.7
"""Programs that share a row in a cluster start together, and exchange their sums through shared memory."""
TURN_US = 0.61
"""What a turn of a walking program waits for its rows, and for the way round the loop."""
TURN_ELEMENT_US = 0.0045
"""What each element of a thread adds to a turn, where it comes in vectors."""
SHARED_TURN_US = 0.98
"""What a turn waits where programs share its rows: for the slowest to publish its sums, and for these to arrive."""
SECTOR_BYTES = 32
"""The least that a load brings from memory."""
NARROW_BYTES = 22
"""Adjacent bytes so few that memory moves as many again in vain; with twice as many a quarter."""
PARTIAL_BYTES = 8
"""Of each element of a partial row of dw: fp32, written once and read once."""

LEAST = Resources(registers=16, spill_bytes=0, shared_bytes=0)
"""No binary lets more programs run at once than one that takes this."""


class Program(NamedTuple):
    """What a program does with the SM to itself: turns of turn_us each, one in a forward; and the bytes that all programs move."""

    turn_us: float
    turns: int
    moved: float


def estimate_us(problem: Problem, config: Config, resources: Resources, architecture: Architecture) -> float:
    """µs that the config takes, all data in memory; of a backward both launches."""
    device = architecture.device
    known = kernel_arguments(config, geometry_of_problem(problem), ptx=architecture.target.backend == "cuda")
    arguments = {**known, "sm_count": device.sm_count}
    programs = math.prod(VARIANTS[config.variant].grid(arguments))
    threads = int(config.params["num_warps"]) * device.warp_size
    running = device.sm_count * _programs_at_once(threads, resources, architecture)
    program = (_backward if problem.is_backward else _forward)(problem, config, arguments, device, programs, running)
    waves_us = math.ceil(programs / running) * program.turns * program.turn_us
    memory_us = program.turn_us + _memory_us(program.moved, architecture)
    starts_us = programs / device.sm_count * PROGRAM_US
    column_sum_us = LAUNCH_US + LATENCY_US if problem.is_backward and problem.w_dtype != NO_WEIGHT else 0.0
    return LAUNCH_US + math.hypot(waves_us, memory_us, starts_us) + column_sum_us


def least_us(problem: Problem, config: Config, architecture: Architecture) -> float:
    """No binary of the config has a smaller estimate: as many programs at once as there can be, and a second read finds all in L2."""
    boundless = replace(architecture, device=replace(architecture.device, l2_bytes=2**62))
    return estimate_us(problem, config, LEAST, boundless)


def modelled(problem: Problem, config: Config, resources: Resources, architecture: Architecture) -> Measurement:
    """The estimate in the form of a Measurement under its own policy, so that it never mixes with measured times."""
    time_us = estimate_us(problem, config, resources, architecture)
    copy_us = LAUNCH_US + _memory_us(problem.bytes_moved, architecture)
    return Measurement(POLICY, time_us, time_us, time_us, copy_us / time_us, rounds=0)


def _memory_us(moved: float, architecture: Architecture) -> float:
    return moved / (architecture.device.bandwidth_gbs * 1e3 * COPY_EFFICIENCY)


def _programs_at_once(threads: int, resources: Resources, architecture: Architecture) -> int:
    """Programs that one SM runs at once. Registers are handed out by eights a thread."""
    registers = threads * -(-max(resources.registers, 1) // 8) * 8
    limits = [architecture.registers_per_sm // registers, architecture.threads_per_sm // threads, architecture.programs_per_sm]
    if resources.shared_bytes:
        limits.append(architecture.device.shared_bytes // resources.shared_bytes)
    return max(1, min(limits))


def _held(arguments: Mapping[str, Any]) -> int:
    """Elements of each tensor that a program holds at once; masked lanes take their time as well."""
    blocks = ("BLOCK_COLS", "BLOCK_INNER", "ROWS_PER_PROGRAM", "PIECE_COLS", "PIECES")
    return math.prod(int(arguments.get(name, 1)) for name in blocks)


def _forward(problem: Problem, config: Config, arguments: Mapping[str, Any], device: Device, programs: int, running: int) -> Program:
    num_warps, held, size = int(config.params["num_warps"]), _held(arguments), itemsize(problem.x_dtype)
    elements = problem.rows * problem.cols
    reads_twice = config.variant == "looped" or (config.variant == "strided_axis" and not arguments["ONE_BLOCK"])
    loads = -(-elements // (programs * held)) * (2 if reads_twice else 1)
    streams = 2 if problem.adds else 1  # of what is read: x, an addend
    program_us = loads * (LATENCY_US + streams * held / (num_warps * device.warp_size) * THREAD_ELEMENT_US)
    program_us += math.log2(num_warps) * WARPS_SUM_US + _exchange_us(config, problem.cols)
    program_us += LATE_WEIGHT_US if problem.w_dtype != NO_WEIGHT and config.params.get("weight_first") is False else 0.0

    moved = float(problem.bytes_moved)
    if reads_twice and min(programs, running) * elements * size / programs > device.l2_bytes / 2:
        moved += elements * size
    if config.variant == "strided_axis":
        moved *= min(1 + (NARROW_BYTES / (size * int(arguments["BLOCK_INNER"]))) ** 2, SECTOR_BYTES / size)
    return Program(program_us, 1, moved)


def _exchange_us(config: Config, cols: int) -> float:
    if config.variant == "cluster_row":
        return CLUSTER_US
    if config.variant == "split_row":
        chunk = int(config.params["block_cols"]) * int(config.params["max_pieces"])
        return SHARE_US + SHARER_US * -(-cols // chunk)
    return 0.0


def _backward(problem: Problem, config: Config, arguments: Mapping[str, Any], device: Device, programs: int, running: int) -> Program:
    variant: Any = VARIANTS[config.variant]
    num_warps = int(config.params["num_warps"])
    threads = num_warps * device.warp_size
    partial_rows = variant.partial_rows(arguments)
    turns = -(-problem.rows // (partial_rows * int(arguments.get("ROWS_PER_PROGRAM", 1))))
    vector = VECTOR_BYTES // itemsize(problem.x_dtype)
    adjacent, row_warps = vector, float(num_warps)
    if config.variant == "backward_multi_row":
        adjacent = _adjacent(problem, arguments, threads, vector)
        row_warps = min(row_warps, max(1.0, arguments["BLOCK_COLS"] / (adjacent * device.warp_size)))
    streams = 3 if problem.adds else 2  # of what is read: x, dy, a sum's gradient
    elements_us = streams * _held(arguments) / threads * vector / adjacent * TURN_ELEMENT_US
    if config.variant == "backward_split_row":
        turns += 1  # a row is published a turn before it is finished
        turn_us = SHARED_TURN_US + elements_us
        if programs > running:  # who waits in vain for a program that has not started reads all of the row
            turn_us += variant.split_of(arguments) * (TURN_US + elements_us)
    else:
        turn_us = (TURN_US + elements_us + math.log2(row_warps) * WARPS_SUM_US) / max(1, int(arguments["STAGES"]) - 1)
    partial_elements = partial_rows * problem.cols if problem.w_dtype != NO_WEIGHT else 0
    return Program(turn_us, turns, problem.bytes_moved + PARTIAL_BYTES * partial_elements)


def _adjacent(problem: Problem, arguments: Mapping[str, Any], threads: int, vector: int) -> int:
    """Adjacent columns of a tile of rows that a thread takes at once: a vector of them, or fewer.

    In a pipelined loop Triton lets the threads hold the tile as they hold the weight, a single row: where that has less than a vector a
    thread, all threads share a row, and take it from shared memory in as narrow pieces (H100, 131072x128, 4 warps: 96 µs
    with three stages, 60 with one).
    """
    weight_cols = int(arguments["BLOCK_COLS"]) // threads
    as_weight = problem.w_dtype != NO_WEIGHT and int(arguments["STAGES"]) > 1 and weight_cols > 0
    return min(vector, weight_cols) if as_weight else vector
