"""The sweep without a GPU, its compiler faked: branch and bound leaves out nothing that could win, and what is done stays done."""

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernels.variants import candidates
from tuner.architectures import Architecture, architectures
from tuner.compile_only import SEARCHES_PER_WORKER, Search
from tuner.compiling import Compiled, binary_for
from tuner.events import Event, Finished
from tuner.jobs import Job
from tuner.model import modelled
from tuner.station import LocalStation, local_stations
from tuner.sweep import sweep
from tuner.trials import TrialBook
from tuning_db.derive import derive_record
from tuning_db.model import BACKWARD, Problem, Resources, Source, Status
from tuning_db.store import Store, open_for_writing

H100 = architectures()["sm_90"]
PROBLEMS = [
    *(Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", rows, cols) for rows in (1, 512, 32_768) for cols in (128, 4096, 65_536)),
    Problem("rmsnorm", "float32", "none", "float32", 4096, 1024, "strided_axis", 64),
    *(Problem(BACKWARD, "bfloat16", "float32", "bfloat16", rows, cols) for rows, cols in ((4096, 4096), (131_072, 128), (512, 65_536))),
]


def compiled(binary: object) -> Compiled:
    """Between 16 and 255 registers, whatever the binary's name gives; one in five spills."""
    number = zlib.crc32(str(binary).encode())
    resources = Resources(16 + number % 240, 4 * (number % 5 == 0), number % 4096)
    return Compiled(Status.OUT_OF_RESOURCES if resources.spill_bytes else Status.OK, resources)


class FakePool:
    """Compiles as `compiled` says, one binary of a search at a time."""

    progress = (0, 0)

    def result(self, binary: object) -> Compiled:
        return compiled(binary)

    def load_bytes(self, binary: object) -> int:
        return 8

    def close(self) -> None:
        pass


def job(problem: Problem, board: Architecture = H100) -> Job:
    return Job(problem, board.device, board, None, "sweep")


def swept(store: Store, problems: list[Problem], pool: Any, budget_s: float | None = None) -> list[Event]:
    events: list[Event] = []
    stations = [LocalStation(pool, None) for _ in range(2)]
    sweep(problems, H100.device, H100, stations, store, ["sweep"], events.append, budget_s)
    return events


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_for_writing(tmp_path / "tuning.sqlite") as opened:
        yield opened


@pytest.mark.parametrize("arch", ["sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_pick_is_that_of_compiling_everything(problem: Problem, arch: str) -> None:
    board = architectures()[arch]
    search = Search(job(problem, board))
    while search.config is not None:
        search.take(search.config, compiled(search.binary_for(search.config)))
    book = TrialBook(job(problem, board))
    everything = candidates(problem, board.device)
    for config in everything:
        outcome = compiled(binary_for(problem, config, board.target))
        if outcome.status is Status.OK and outcome.resources is not None:
            estimate = modelled(problem, config, outcome.resources, board)
            book.add(config, outcome.status, resources=outcome.resources, measurement=estimate, final=True)
    wanted, found = derive_record(book.trials), derive_record(search.book.trials)
    assert wanted is not None
    assert found is not None
    assert (found.config, found.median_us) == (wanted.config, wanted.median_us)
    assert len(search.book.trials) <= len(everything)


def test_most_candidates_are_ruled_out_without_a_compiler() -> None:
    """What a real binary takes, 32 registers say, is near the bound: then a handful of candidates of some twenty is compiled."""
    search = Search(job(PROBLEMS[4]))
    while search.config is not None:
        search.take(search.config, Compiled(Status.OK, Resources(32, 0, 0)))
    assert 0 < len(search.book.trials) <= len(candidates(PROBLEMS[4], H100.device)) // 2


def test_where_everything_fails_everything_is_tried_and_nothing_recorded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePool, "result", lambda self, binary: Compiled(Status.COMPILE_ERROR, error="no"))
    events = swept(store, PROBLEMS[:1], FakePool())
    everything = len(candidates(PROBLEMS[0], H100.device))
    assert events[-1] == Finished(PROBLEMS[0], None, everything, everything)
    assert store.records() == []


def test_every_problem_is_recorded_once_however_many_there_are(store: Store) -> None:
    finished = [event for event in swept(store, PROBLEMS, FakePool()) if isinstance(event, Finished)]
    assert sorted(event.problem for event in finished) == sorted(PROBLEMS)
    assert {event.load_bytes for event in finished} == {8}
    records = store.records(H100.device.uid)
    assert {record.problem for record in records} == set(PROBLEMS)  # none for any number of rows: those are measured
    assert {record.source for record in records} == {Source.MODELLED}


def test_what_is_in_work_when_the_time_is_up_is_finished(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read once at the start and before each assignment: two begin, one on each station."""
    ticks = itertools.count()
    monkeypatch.setattr("tuner.sweep.time.monotonic", lambda: float(next(ticks)))
    swept(store, PROBLEMS, FakePool(), 2.5)
    assert {record.problem for record in store.records()} == set(PROBLEMS[:2])
    assert [row.state for row in store.sweeps()] == ["finished"]


def test_what_stalled_the_compiler_is_not_compiled_again() -> None:
    stalled = Search(job(PROBLEMS[0])).config
    assert stalled is not None
    search = Search(job(PROBLEMS[0]), {stalled})
    tried = []
    while search.config is not None:
        tried.append(search.config)
        search.take(search.config, Compiled(Status.OK, Resources(32, 0, 0)))
    assert tried
    assert stalled not in tried


def test_enough_stations_keep_every_compiler_busy() -> None:
    made = local_stations(H100.device, ())
    try:
        (pool,) = {station.compiler for station in made}
        assert len(made) == SEARCHES_PER_WORKER * pool.workers
    finally:
        made[0].close()
