"""A simple estimate of a config's time from its binary's resources, for GPUs that nobody has measured."""

from __future__ import annotations

import math

from kernels.geometry import geometry_of_problem
from kernels.launch import kernel_arguments
from kernels.variants import VARIANTS
from tuner.architectures import Architecture
from tuning_db.model import Config, Measurement, Problem, Resources, itemsize

POLICY = "model-1"

LATENCY_US = 0.8
"""From a load to its data under load; H100."""
LAUNCH_US = 1.2
"""An empty kernel in a graph; H100."""
ARRIVAL_US = 1.6
"""What publishing and awaiting the partial sums of a split row takes; H100, 1 × 131072."""


def estimate_us(problem: Problem, config: Config, resources: Resources, architecture: Architecture) -> float:
    """Launch floor plus bytes over the bandwidth that the bytes in flight allow (Little's law), in whole waves if they are few."""
    device = architecture.device
    geometry = geometry_of_problem(problem)
    arguments = kernel_arguments(config, geometry, ptx=architecture.target.backend == "cuda")
    programs = math.prod(VARIANTS[config.variant].grid(arguments))
    threads = int(config.params["num_warps"]) * device.warp_size
    resident = min(architecture.registers_per_sm // (threads * max(resources.registers, 16)), architecture.threads_per_sm // threads)
    resident = max(1, min(resident, 32))

    x_bytes = geometry.rows * geometry.cols * itemsize(problem.x_dtype)
    held_bytes = min(x_bytes / programs, _tile_elements(arguments) * itemsize(problem.x_dtype))
    running = min(programs, resident * device.sm_count)
    bytes_per_us = device.bandwidth_gbs * 1e3
    in_flight = running * held_bytes
    speed = min(1.0, in_flight / (bytes_per_us * LATENCY_US))

    moved = problem.bytes_moved
    reads_twice = config.variant == "looped" or (config.variant == "strided_axis" and not arguments["ONE_BLOCK"])
    if reads_twice and running * x_bytes / programs > device.l2_bytes / 2:
        moved += x_bytes
    waves = programs / (resident * device.sm_count)
    quantised = math.ceil(waves) / waves if 1 < waves < 4 else 1.0
    arrival = ARRIVAL_US if config.variant == "split_row" else 0.0
    return LAUNCH_US + LATENCY_US + arrival + moved / (bytes_per_us * speed) * quantised


def modelled(problem: Problem, config: Config, resources: Resources, architecture: Architecture) -> Measurement:
    """The estimate in the form of a Measurement under its own policy, so that it never mixes with measured times."""
    time_us = estimate_us(problem, config, resources, architecture)
    copy_us = LAUNCH_US + LATENCY_US + problem.bytes_moved / (architecture.device.bandwidth_gbs * 1e3)
    return Measurement(POLICY, time_us, time_us, time_us, copy_us / time_us, rounds=0)


def _tile_elements(arguments: dict[str, int]) -> int:
    """Elements of x that a program can have in flight: its block, or everything it holds where there is no loop over blocks."""
    elements = math.prod(arguments.get(name, 1) for name in ("BLOCK_COLS", "BLOCK_INNER", "ROWS_PER_PROGRAM", "PIECES"))
    return int(elements)
