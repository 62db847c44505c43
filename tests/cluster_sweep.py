"""A compile-only sweep on a local Ray cluster of two nodes, of which it loses one process and then one whole node; no test itself.

    python tests/cluster_sweep.py DATABASE

prints a line for each problem finished, and what was killed. Needs Ray.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from ray.cluster_utils import Cluster as LocalCluster

from tuner.architectures import architectures
from tuner.boards import Board
from tuner.cluster import Cluster
from tuner.events import Event, Finished
from tuner.session import Session
from tuning_db.model import Problem
from tuning_db.store import open_for_writing

PROBLEMS = tuple(Problem("rmsnorm", *("bfloat16",) * 3, 8, cols, "two_stride") for cols in (64, 128, 192, 256, 320, 384))
"""Narrow rows compile fastest."""


def actor_processes() -> list[int]:
    """The processes of this script's actors, by the name that Ray gives them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::RemoteStation") and f"CLUSTER_SWEEP={os.getpid()}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return sorted(found)


def main() -> None:
    os.environ["CLUSTER_SWEEP"] = str(os.getpid())
    nodes = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
    nodes.wait_for_nodes()
    cluster = Cluster(nodes.address)
    finished: list[Problem] = []

    def watch(event: Event) -> None:
        if not isinstance(event, Finished):
            return
        finished.append(event.problem)
        print(f"{event.problem}: {event.record and event.record.config}", flush=True)
        if len(finished) == 1:
            processes = actor_processes()
            os.kill(processes[0], signal.SIGKILL)
            print(f"killed 1 of {len(processes)} actors", flush=True)
        if len(finished) == 2:
            nodes.remove_node(workers[1], allow_graceful=False)
            print("removed 1 of 2 nodes", flush=True)

    try:
        architecture = architectures()["sm_90"]
        session = Session(Board(architecture.device, architecture, cluster=cluster), PROBLEMS, Path(sys.argv[1]), False, None)
        with open_for_writing(session.path) as store:
            session.run(session.todo(store.records()), store, ["sweep"], watch)
    finally:
        cluster.close()
        nodes.shutdown()


if __name__ == "__main__":
    main()
