"""Runs jobs on any number of stations at once: who gets which job, and what becomes of a job whose station is lost."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Generator, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tuner.failure import Failure, JobLost, StationGone
from tuner.jobs import Job, Outcome, Station
from tuning_db.model import Config, Status

FAULTS = (Status.CRASHED, Status.TIMED_OUT)
"""What bars a config: to try it again would cost a worker again."""

JOB_LOSSES = 3
"""A job that was lost so often is given up."""
STATION_LOSSES = 6
"""A station that loses so many jobs in a row is given up: the fault is not the jobs'."""


def outcomes(
    stations: Sequence[Station], jobs: Sequence[Job], barred: Collection[Config], going_on: Callable[[], bool]
) -> Generator[Job | Outcome, None, None]:
    """Yield each job as it begins and each outcome as it comes, while `going_on()` lets jobs begin. Closes the stations at the end.

    The stations work on while the caller deals with what was yielded. A config with a trial of FAULTS is barred from all later runs.
    Raises Failure when no station is left, or when a station has a reason to end the sweep.
    """
    fleet = _Fleet(stations, jobs, barred)
    running: dict[Future[Outcome], tuple[Station, Job]] = {}
    threads = ThreadPoolExecutor(len(stations))
    try:
        ended: list[Outcome] = []
        while True:
            begun = []
            while going_on() and (assignment := fleet.assign()):
                station, job = assignment
                running[threads.submit(station.run, job, frozenset(fleet.barred))] = assignment
                begun.append(job)
            yield from ended
            yield from begun
            if not running:
                return
            done = wait(running, return_when=FIRST_COMPLETED).done
            ended = [outcome for future in done if (outcome := fleet.settle(*running.pop(future), future))]
    finally:
        for station in stations:
            station.close()
        threads.shutdown()


class _Fleet:
    """Which stations are idle, which jobs wait, for anybody or claimed ahead for one compiler, and who lost what."""

    def __init__(self, stations: Sequence[Station], jobs: Sequence[Job], barred: Collection[Config]) -> None:
        self.barred = set(barred)
        self._stations, self._idle = list(stations), list(stations)
        self._waiting = deque(jobs)
        self._claimed: dict[Hashable, deque[Job]] = defaultdict(deque)
        self._losses: Counter[Job] = Counter()
        self._losses_in_a_row: Counter[Station] = Counter()

    def assign(self) -> tuple[Station, Job] | None:
        """A station that is idle, and the job it gets next."""
        for station in self._idle:
            claimed = self._claimed[station.compiler]
            fair = -(-(len(claimed) + len(self._waiting)) // len({other.compiler for other in self._stations}))
            while self._waiting and len(claimed) < min(fair, station.lookahead + 1):
                claimed.append(self._waiting.popleft())
                station.prepare(claimed[-1], self.barred)
            if claimed:
                self._idle.remove(station)
                return station, claimed.popleft()
        return None

    def settle(self, station: Station, job: Job, future: Future[Outcome]) -> Outcome | None:
        """Take the station back, and the job if it is to be run again; what there is to tell of it."""
        try:
            outcome = future.result()
        except StationGone as error:
            self._retire(station, job, error)
            return None
        except JobLost as error:
            self._losses[job] += 1
            self._losses_in_a_row[station] += 1
            given_up = self._losses[job] >= JOB_LOSSES
            if self._losses_in_a_row[station] >= STATION_LOSSES:
                self._retire(station, None if given_up else job, error)
            else:
                self._take_back(station, None if given_up else job)
            return Outcome(job, (), note=f"given up after {JOB_LOSSES} tries: {error}") if given_up else None
        self._losses_in_a_row[station] = 0
        self.barred.update(trial.config for trial in outcome.trials if trial.status in FAULTS)
        self._take_back(station, None if outcome.finished else job)
        return outcome

    def _take_back(self, station: Station, job: Job | None) -> None:
        self._idle.append(station)
        if job is not None:
            self._claimed[station.compiler].appendleft(job)

    def _retire(self, station: Station, job: Job | None, error: Exception) -> None:
        """Go on without a station. What only its compiler was told of is anybody's again."""
        self._stations.remove(station)
        if not self._stations:
            raise Failure(f"the sweep can't go on: {error}") from error
        if job is not None:
            self._waiting.appendleft(job)
        if all(station.compiler is not other.compiler for other in self._stations):
            self._waiting.extendleft(reversed(self._claimed.pop(station.compiler)))
