"""Who gets which job: stations at once, jobs claimed ahead, stations that are lost. Stations here are threads without a GPU."""

import threading
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace

import pytest

from stand_ins import DEVICE, PROBLEMS, TROUBLE
from tuner.failure import Failure, JobLost, StationGone
from tuner.fleet import JOB_LOSSES, STATION_LOSSES, outcomes
from tuner.jobs import Job, Outcome
from tuner.trials import TrialBook
from tuning_db.model import Config, Status

JOBS = [Job(replace(PROBLEMS[0], rows=2**power), DEVICE, None, None, "sweep") for power in range(12)]


class Fake:
    """Notes what it is told of and what it runs; `act` may raise, or return an Outcome."""

    progress = (0, 0)

    def __init__(
        self, act: Callable[[Job, Collection[Config]], Outcome | None] = lambda *_: None, lookahead: int = 0, compiler: Hashable = None
    ) -> None:
        self.act, self.lookahead, self.compiler = act, lookahead, compiler or self
        self.prepared: list[Job] = []
        self.ran: list[Job] = []
        self.closed = False

    def prepare(self, job: Job, barred: Collection[Config]) -> None:
        self.prepared.append(job)

    def run(self, job: Job, barred: Collection[Config]) -> Outcome:
        self.ran.append(job)
        return self.act(job, barred) or Outcome(job, ())

    def close(self) -> None:
        self.closed = True


def run(
    *stations: Fake, jobs: list[Job] = JOBS, barred: Collection[Config] = (), going_on: Callable[[], bool] = lambda: True
) -> list[Outcome]:
    events = list(outcomes(stations, jobs, barred, going_on))
    assert all(station.closed for station in stations)
    return [event for event in events if isinstance(event, Outcome)]


def test_all_stations_work_at_once_and_each_job_is_run_once() -> None:
    meeting = threading.Barrier(3, timeout=30)

    def meet(*_: object) -> None:
        meeting.wait()  # goes on only when three run at once

    stations = [Fake(meet) for _ in range(3)]
    assert {outcome.job for outcome in run(*stations)} == set(JOBS)
    assert sorted(job.problem for station in stations for job in station.ran) == sorted(job.problem for job in JOBS)
    assert [len(station.ran) for station in stations] == [4, 4, 4]


def test_a_shared_compiler_is_told_of_every_job_at_once_and_in_order() -> None:
    told: list[int] = []
    first = Fake(lambda *_: told.append(len(first.prepared) + len(second.prepared)), 10**9, "one")
    second = Fake(lambda *_: None, 10**9, "one")
    run(first, second)
    assert told[0] == len(JOBS)
    assert first.prepared + second.prepared == JOBS


@pytest.mark.parametrize("count", [2, 4, 12])
def test_a_compiler_of_its_own_is_told_of_its_share_alone(count: int) -> None:
    """No more than its lookahead, and so that other stations need not wait where jobs are few."""
    meeting = threading.Barrier(count, timeout=30)
    met = threading.local()

    def meet(*_: object) -> None:
        if not hasattr(met, "once"):
            met.once = True
            meeting.wait()

    stations = [Fake(meet, lookahead=4) for _ in range(count)]
    assert {outcome.job for outcome in run(*stations)} == set(JOBS)
    prepared = [job for station in stations for job in station.prepared]
    assert sorted(job.problem for job in prepared) == sorted(job.problem for job in JOBS)  # nothing is compiled twice
    assert all(station.ran == station.prepared for station in stations)
    assert all(station.ran for station in stations)


def test_no_job_begins_once_time_is_up_and_those_under_way_end() -> None:
    clock = iter([True, True, False])
    stations = Fake(), Fake()
    assert [outcome.job for outcome in run(*stations, going_on=lambda: next(clock, False))] == JOBS[:2]


def test_a_config_at_fault_is_barred_at_once_for_everybody() -> None:
    seen: list[bool] = []

    def act(job: Job, barred: Collection[Config]) -> Outcome | None:
        seen.append(TROUBLE in barred)
        if TROUBLE in barred:
            return None
        book = TrialBook(job)
        book.add(TROUBLE, Status.CRASHED)
        return Outcome(job, tuple(book.trials), finished=False)

    found = run(Fake(act))
    assert [outcome.finished for outcome in found] == [False] + [True] * len(JOBS)
    assert seen == [False] + [True] * len(JOBS)
    assert found[0].job == found[1].job  # run again next
    assert all(outcome.finished for outcome in run(Fake(act), barred=[TROUBLE]))


def test_the_jobs_of_a_station_that_is_gone_are_run_elsewhere() -> None:
    def go(*_: object) -> None:
        raise StationGone("its node is gone")

    gone, left = Fake(go, lookahead=4), Fake(lookahead=4)
    assert {outcome.job for outcome in run(gone, left)} == set(JOBS)
    assert len(gone.ran) == 1
    with pytest.raises(Failure, match="the sweep can't go on: its node is gone"):
        run(Fake(go), Fake(go))


def test_a_job_that_is_lost_is_run_again_and_in_the_end_given_up() -> None:
    def lose(job: Job, _: Collection[Config]) -> None:
        if job == JOBS[0]:
            raise JobLost("killed")

    station = Fake(lose)
    notes = {outcome.job: outcome.note for outcome in run(station)}
    assert notes == {**dict.fromkeys(JOBS, ""), JOBS[0]: f"given up after {JOB_LOSSES} tries: killed"}
    assert station.ran.count(JOBS[0]) == JOB_LOSSES


def test_a_station_that_loses_everything_is_left_behind() -> None:
    def lose(*_: object) -> None:
        raise JobLost("killed")

    station = Fake(lose)
    with pytest.raises(Failure, match="killed"):
        run(station)
    assert len(station.ran) == STATION_LOSSES


def test_an_exception_ends_all_stations() -> None:
    stations = Fake(), Fake(lambda *_: 1 // 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        run(*stations)
    assert all(station.closed for station in stations)
