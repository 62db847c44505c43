"""An analytic estimate of a config's time from its binary's resources, for GPUs that nobody has measured.

A program's own time is what it waits for one after the other: data, the arithmetic of a thread, the sums of its warps, the exchange with
other programs. So many programs run at once as registers, threads and shared memory of the SMs allow, the others in waves after them.
Memory moves the bytes of all of them meanwhile, and starting a program costs its SM a little. The estimate is the launch and the root
of the sum of squares of these three times: the largest decides, with rounded corners.

The constants are fitted to the trials of an H100's sweep alone, but for LAUNCH_US and COPY_EFFICIENCY, which are measured. On the
default workload `python -m tuner regret` finds the picks 1.7 % slower than the fastest config in the geometric mean and 7.4 % at p95
on an H100, 2.2 % and 9.4 % on an H200, which the fit never saw. Fitted to one half of the H100's problems, they lose 2.2 to 2.5 % and
9 % on the other.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kernels.geometry import geometry_of_problem
from kernels.launch import kernel_arguments
from kernels.variants import VARIANTS
from tuner.architectures import Architecture
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD, NO_WEIGHT, Config, Measurement, Problem, Resources, itemsize

POLICY = "model-2"

LAUNCH_US = 1.0
"""An empty kernel in a graph; H100."""
COPY_EFFICIENCY = 0.92
"""Of the published bandwidth, what a large copy reaches; H100."""
LATENCY_US = 0.3
"""From a program's loads to the data in its registers."""
THREAD_ELEMENT_US = 0.011
"""What each element of a thread adds: load, square, scale, store, with the other programs of the SM at work."""
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
SECTOR_BYTES = 32
"""The least that a load brings from memory."""
NARROW_BYTES = 22
"""Adjacent bytes so few that memory moves as many again in vain; with twice as many a quarter."""

LEAST = Resources(registers=16, spill_bytes=0, shared_bytes=0)
"""No binary lets more programs run at once than one that takes this."""


def estimate_us(problem: Problem, config: Config, resources: Resources, architecture: Architecture) -> float:
    """µs that the config takes, all data in memory; of a backward both launches."""
    device = architecture.device
    geometry = geometry_of_problem(problem)
    arguments = kernel_arguments(config, geometry, ptx=architecture.target.backend == "cuda")
    programs = math.prod(VARIANTS[config.variant].grid({**arguments, "sm_count": device.sm_count}))
    num_warps = int(config.params["num_warps"])
    threads = num_warps * device.warp_size
    running = device.sm_count * _programs_at_once(threads, resources, architecture)

    size = itemsize(problem.x_dtype)
    elements = geometry.rows * geometry.cols
    blocks = ("BLOCK_COLS", "BLOCK_INNER", "ROWS_PER_PROGRAM", "PIECES")
    held = math.prod(int(arguments.get(name, 1)) for name in blocks)  # masked lanes take their time as well
    reads_twice = config.variant == "looped" or (config.variant == "strided_axis" and not arguments["ONE_BLOCK"])
    turns = -(-elements // (programs * held)) * (2 if reads_twice else 1)
    streams = {FORWARD: 1, BACKWARD: 2, ADD_FORWARD: 2, ADD_BACKWARD: 3}[problem.op]  # of what is read: x, dy, an addend, a sum's gradient
    latency_us = LATENCY_US / int(arguments.get("STAGES", 1))  # of a pipelined loop
    program_us = turns * (latency_us + streams * held / threads * THREAD_ELEMENT_US) + math.log2(num_warps) * WARPS_SUM_US
    program_us += _exchange_us(config, geometry.cols)
    program_us += LATE_WEIGHT_US if problem.w_dtype != NO_WEIGHT and config.params.get("weight_first") is False else 0.0

    moved = float(problem.bytes_moved)
    if reads_twice and min(programs, running) * elements * size / programs > device.l2_bytes / 2:
        moved += elements * size
    if config.variant == "strided_axis":
        moved *= min(1 + (NARROW_BYTES / (size * int(arguments["BLOCK_INNER"]))) ** 2, SECTOR_BYTES / size)
    waves_us = math.ceil(programs / running) * program_us
    starts_us = programs / device.sm_count * PROGRAM_US
    column_sum_us = LAUNCH_US + LATENCY_US if problem.is_backward and problem.w_dtype != NO_WEIGHT else 0.0
    return LAUNCH_US + math.hypot(waves_us, program_us + _memory_us(moved, architecture), starts_us) + column_sum_us


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


def _exchange_us(config: Config, cols: int) -> float:
    if config.variant == "cluster_row":
        return CLUSTER_US
    if config.variant in ("split_row", "backward_split_row"):
        chunk = int(config.params["block_cols"]) * int(config.params.get("max_pieces", 1))
        return SHARE_US + SHARER_US * -(-cols // chunk)
    return 0.0
