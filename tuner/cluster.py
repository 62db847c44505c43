"""Stations on the hosts of a Ray cluster: an actor for each GPU, with compile processes of its own, since those need the GPU's disk."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kernels.device import describe
from kernels.variants import VARIANTS, source_hash
from tuner.architectures import target_of
from tuner.compiling import CompilePool
from tuner.failure import Failure, JobLost, StationGone
from tuner.jobs import Job, Outcome
from tuner.station import LocalStation
from tuner.worker import Worker
from tuning_db.model import Config, Device

CONNECT_LIMIT_S = 10.0
START_LIMIT_S = 180.0
"""Longest time for an actor to get its share of a node and to start; a node whose GPUs are busy with other work is left out."""


class Cluster:
    """A connection to a Ray cluster. The nodes need this package, torch and Triton, in the versions of this process."""

    def __init__(self, address: str) -> None:
        """address: `auto`, `host:port` or what else `ray.init` takes. Raises Failure where nobody answers."""
        try:
            host, _, port = address.rpartition(":")
            if host and port.isdigit():  # Ray would try for many minutes
                socket.create_connection((host, int(port)), timeout=CONNECT_LIMIT_S).close()
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        except OSError as error:  # Ray's is a ConnectionError
            raise Failure(f"no Ray cluster answers at {address}: `ray start --head` starts one") from error
        self._nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        self._devices: dict[str, Device] = {}

    def devices(self) -> list[Device]:
        """The kinds of GPU there are, by asking one GPU of each node."""
        if not any(resources.get("GPU") for resources in self._nodes.values()):
            return []
        self._devices = self._ask()
        if not self._devices:
            raise Failure(f"no GPU of the cluster was free in {START_LIMIT_S:g} s")
        return sorted(set(self._devices.values()), key=lambda device: device.uid)

    def stations(self, device: Device, *, gpus: bool) -> list[RayStation]:
        """One for each GPU of a kind that `devices` found; or one for each CPU, to compile for a device. Raises Failure."""
        stations = []
        for node, resources in self._nodes.items():
            count = int(resources.get("GPU" if gpus else "CPU", 0))
            cpus = int(resources.get("CPU", 0)) // max(1, count)
            if not gpus or self._devices.get(node) == device:
                stations += [RayStation(node, device, gpu=gpus, cpus=cpus) for _ in range(count)]
        if not stations:
            raise Failure("no node of the cluster has a CPU to compile on")
        return stations

    def close(self) -> None:
        ray.shutdown()

    def _ask(self) -> dict[str, Device]:
        asked = {
            ray.remote(_ask_gpu).options(**_on(node), num_gpus=1, num_cpus=0).remote(): node
            for node, resources in self._nodes.items()
            if resources.get("GPU")
        }
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=START_LIMIT_S)
        return {asked[reference]: _result(reference) for reference in answered}


class RayStation:
    """An actor on one node. Lost with its process, it is started anew; lost with its node, it is gone."""

    lookahead = 4
    progress = (0, 0)

    def __init__(self, node: str, device: Device, *, gpu: bool, cpus: int) -> None:
        self.compiler = self
        remote: Any = ray.remote(RemoteStation).options(**_on(node), num_gpus=int(gpu), num_cpus=cpus, max_concurrency=2)
        self._start: Callable[[], Any] = lambda: remote.remote(device, gpu, max(1, cpus))
        self._actor: Any = None
        self._is_up = False

    def prepare(self, job: Job, barred: Collection[Config]) -> None:
        self._actor = self._actor or self._start()
        self._actor.prepare.remote(job, frozenset(barred))

    def run(self, job: Job, barred: Collection[Config]) -> Outcome:
        self._actor = self._actor or self._start()
        try:
            if not self._is_up:
                _result(self._actor.check_sources.remote(_sources()), START_LIMIT_S)
                self._is_up = True
        except (ActorUnschedulableError, GetTimeoutError, RayActorError) as error:
            raise StationGone(f"a node of the cluster can't be used: {_first_line(error)}") from error
        try:
            return _result(self._actor.run.remote(job, barred))
        except RayActorError as error:
            self._actor, self._is_up = None, False
            raise JobLost(f"an actor was lost: {_first_line(error)}") from error

    def close(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)


class RemoteStation:
    """What the actor is: a station of its host. Its GPU is the one that Ray lets it see."""

    def __init__(self, device: Device, gpu: bool, cpus: int) -> None:
        pool = CompilePool(device, target_of(device.arch, device.warp_size), cpus)
        self._station = LocalStation(pool, Worker() if gpu else None)

    def check_sources(self, expected: dict[str, str]) -> None:
        """Raises StationGone if the kernels installed here are not the driver's: its trials would be of others."""
        if _sources() != expected:
            raise StationGone("a node has another version of this package: install the same everywhere")

    def prepare(self, job: Job, barred: Collection[Config]) -> None:
        self._station.prepare(job, barred)

    def run(self, job: Job, barred: Collection[Config]) -> Outcome:
        return self._station.run(job, barred)


def _ask_gpu() -> Device:
    """On a node: which GPU Ray gives to a task there."""
    try:
        return describe(0)
    except (OSError, RuntimeError) as error:
        raise Failure(f"a node of the cluster says that it has a GPU, but {error}") from error


def _result(reference: Any, limit_s: float | None = None) -> Any:
    """What a call returned. An exception that it raised is raised as it was, not in Ray's wrapping with a traceback for its text."""
    try:
        return ray.get(reference, timeout=limit_s)
    except RayTaskError as error:
        raise error.cause from error


def _on(node: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node, soft=False)}


def _sources() -> dict[str, str]:
    return {name: source_hash(name) for name in VARIANTS}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
