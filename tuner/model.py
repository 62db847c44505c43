"""A simple estimate of a config's time from its binary's resources, for GPUs that nobody has measured."""

from __future__ import annotations

import math

from kernels.geometry import geometry_of_problem
from kernels.launch import kernel_arguments
from kernels.variants import VARIANTS
from tuner.architectures import Architecture
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD, NO_WEIGHT, Config, Measurement, Problem, Resources, itemsize

POLICY = "model-1"

LAUNCH_US = 1.0
"""An empty kernel in a graph; H100."""
LATENCY_US = 0.7
"""From a program's start to its first data under load; H100."""
THREAD_ELEMENT_US = 0.02
"""What each element of a thread adds to its program: load, square, scale, store, with the other programs of the SM at work; H100."""
LATE_WEIGHT_US = 0.2
"""What loading the weight after the reduction adds to a program; H100."""
EXCHANGE_US = {"split_row": 0.8, "cluster_row": 0.4, "backward_split_row": 1.0}
"""What exchanging the partial sums of a shared row adds to a program, a cluster's late start included; fitted to an H100's sweep."""
SECTOR_BYTES = 32
"""The least that a load brings from memory."""
SHARPNESS = 4
"""Of the corner between latency-bound and bandwidth-bound: the p of a p-norm."""


def estimate_us(problem: Problem, config: Config, resources: Resources, architecture: Architecture) -> float:
    """Launch floor, and the larger of two times with a rounded corner: bytes over bandwidth, and programs over how many run at once."""
    device = architecture.device
    geometry = geometry_of_problem(problem)
    arguments = kernel_arguments(config, geometry, ptx=architecture.target.backend == "cuda")
    programs = math.prod(VARIANTS[config.variant].grid({**arguments, "sm_count": device.sm_count}))
    threads = int(config.params["num_warps"]) * device.warp_size
    by_registers = architecture.registers_per_sm // (threads * max(resources.registers, 16))
    resident = max(1, min(by_registers, architecture.threads_per_sm // threads, 32))
    running = min(programs, resident * device.sm_count)

    size = itemsize(problem.x_dtype)
    x_bytes = geometry.rows * geometry.cols * size
    blocks = ("BLOCK_COLS", "BLOCK_INNER", "ROWS_PER_PROGRAM", "PIECES")
    held = math.prod(int(arguments.get(name, 1)) for name in blocks)  # masked lanes take their time as well
    passes = max(1.0, x_bytes / size / programs / held)
    reads_twice = config.variant == "looped" or (config.variant == "strided_axis" and not arguments["ONE_BLOCK"])
    turns = passes * (2 if reads_twice else 1)
    streams = {FORWARD: 1, BACKWARD: 2, ADD_FORWARD: 2, ADD_BACKWARD: 3}[problem.op]  # of what is read: x, dy, an addend, a sum's gradient
    latency_us = LATENCY_US / int(arguments.get("STAGES", 1))  # of a pipelined loop
    program_us = turns * (latency_us + streams * held / threads * THREAD_ELEMENT_US)
    program_us += EXCHANGE_US.get(config.variant, 0.0)
    program_us += LATE_WEIGHT_US if problem.w_dtype != NO_WEIGHT and config.params.get("weight_first") is False else 0.0

    moved = float(problem.bytes_moved)
    if config.variant == "strided_axis":
        moved *= max(1.0, SECTOR_BYTES / (size * int(arguments["BLOCK_INNER"])))
    if reads_twice and running * x_bytes / programs > device.l2_bytes / 2:
        moved += x_bytes
    bandwidth_bound = moved / (device.bandwidth_gbs * 1e3)
    latency_bound = program_us * max(1.0, programs / running)
    column_sum_us = LAUNCH_US + LATENCY_US if problem.is_backward and problem.w_dtype != NO_WEIGHT else 0.0
    return _total_us(bandwidth_bound, latency_bound) + column_sum_us


def modelled(problem: Problem, config: Config, resources: Resources, architecture: Architecture) -> Measurement:
    """The estimate in the form of a Measurement under its own policy, so that it never mixes with measured times."""
    time_us = estimate_us(problem, config, resources, architecture)
    copy_us = _total_us(problem.bytes_moved / (architecture.device.bandwidth_gbs * 1e3), LATENCY_US)
    return Measurement(POLICY, time_us, time_us, time_us, copy_us / time_us, rounds=0)


def _total_us(bandwidth_bound: float, latency_bound: float) -> float:
    return LAUNCH_US + (bandwidth_bound**SHARPNESS + latency_bound**SHARPNESS) ** (1 / SHARPNESS)
