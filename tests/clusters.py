"""A cluster in one process and its clock: machines that die and freeze, a store that delays, throttles and fails.

The engine's own code runs in threads of which one runs at a time: each call of a store is a request, which takes as
much of the clock's time as the script of a seed says, and then it is the turn of whoever waits for the least. So a seed
is one history, and hours of it are a second.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, TypeVar

from weightops.engine.control import Control
from weightops.engine.job.place import OpenJob
from weightops.engine.job.work import work
from weightops.errors import NetworkFailed, WeightopsError

T = TypeVar("T")
_TRIES = 5
_LONGEST_S = 200_000.0
_FROZEN_S, _TTL_S, _RESTART_S = 4000.0, 600.0, 30.0


class Clock:
    """Time that passes when everybody waits. `spawn` begins a process, `sleep` lets the others have their turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch: Callable[[], None] = lambda: None
        self._waiting: list[tuple[float, int, threading.Semaphore]] = []
        self._order = itertools.count()
        self._turn_ends = threading.Semaphore(0)
        self._failures: list[BaseException] = []

    def spawn(self, process: Callable[[], None]) -> None:
        mine = threading.Semaphore(0)

        def run() -> None:
            mine.acquire()
            try:
                process()
            except BaseException as error:
                self._failures.append(error)
            self._turn_ends.release()

        threading.Thread(target=run, daemon=True).start()
        heapq.heappush(self._waiting, (self.now, next(self._order), mine))

    def sleep(self, seconds: float) -> None:
        mine = threading.Semaphore(0)
        heapq.heappush(self._waiting, (self.now + seconds, next(self._order), mine))
        self._turn_ends.release()
        mine.acquire()

    def run(self) -> None:
        """Until no process is left; raises what one of them raised."""
        while self._waiting:
            self.now, _, whose = heapq.heappop(self._waiting)
            assert self.now < _LONGEST_S, "it does not end"
            whose.release()
            self._turn_ends.acquire()
            if self._failures:
                raise self._failures[0]
            self.watch()

    def monotonic(self) -> float:
        return self.now


class Died(BaseException):
    """What a machine was doing is over, as by SIGKILL: nothing that it still tries has an effect."""


@dataclass
class Machine:
    """A process on some node: `group` is what it does, if it does one; `commits` how many files it gave their names."""

    group: int | None = None
    is_dead: bool = False
    commits: int = 0


@dataclass(frozen=True)
class Rates:
    """What goes wrong: of all requests, this share."""

    slow: float = 0.02
    throttled: float = 0.02
    dropped: float = 0.02
    lost: float = 0.02
    fatal: float = 0.003
    deadly: float = 0.003
    freezing: float = 0.001


@dataclass
class Cluster:
    """`nodes` nodes that do a job's groups, as an `Executor`; and what has happened so far."""

    seed: int
    rates: Rates = Rates()
    nodes: int = 64
    requests_per_s: int = 400
    """Above it the store refuses for a while."""
    link_nbytes_per_s: float = 1.25e9
    store_nbytes_per_s: float = 16e9
    """What a machine, and what all together, can send."""
    scale: int = 2_000_000
    """How many bytes each byte stands for on its way to the store: files of 2 KB take as long as ones of 4 GB."""
    needs_job: ClassVar[bool] = True
    clock: Clock = field(default_factory=Clock)
    commits: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    hit: set[int] = field(default_factory=set)
    """Groups that were lost when they were done already, or went on in two places: once each."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._here = threading.local()
        self._second, self._requests, self._free_at = 0, 0, 0.0

    # --- machines ----------------------------------------------------------------------------------------------------

    def as_machine(self, machine: Machine, task: Callable[[], T]) -> T:
        """Do something as a process of its own, which may die: raises `Died`."""
        before = getattr(self._here, "machine", None)
        self._here.machine = machine
        try:
            return task()
        finally:
            self._here.machine = before

    @property
    def here(self) -> Machine:
        """The machine that this thread is."""
        machine: Machine = self._here.machine
        return machine

    def may_lose(self, machine: Machine, *, anyway: bool = False) -> bool:
        """Whether the script may take a machine away now: of what is done already each group is lost once at most."""
        if machine.group is None or not (machine.commits or anyway):
            return True
        if machine.group in self.hit:
            return False
        self.hit.add(machine.group)
        return True

    def do(self, job: OpenJob, groups: Sequence[int], control: Control) -> None:
        """The groups, each by whoever is free; again when a machine dies, fails, or says nothing for too long."""
        waiting, done = deque(groups), set[int]()
        holders: dict[int, tuple[Machine, float]] = {}

        def serve() -> None:
            while len(done) < len(groups):
                if not waiting:
                    self.clock.sleep(5)
                    continue
                number = waiting.popleft()
                machine = Machine(number)
                holders[number] = machine, self.clock.now
                try:
                    self.as_machine(machine, partial(work, job.place, number, Control(), threads=1))
                    done.add(number)
                    continue
                except WeightopsError:
                    pass
                except Died:
                    self.clock.sleep(_RESTART_S)
                if holders[number][0] is machine and number not in done:
                    waiting.append(number)

        for _ in range(self.nodes):
            self.clock.spawn(serve)
        while len(done) < len(groups):
            self.clock.sleep(10)
            for number, (_, since) in list(holders.items()):
                if number not in done and self.clock.now - since > _TTL_S:
                    self.hit.add(number)
                    holders[number] = Machine(), self.clock.now
                    if number not in waiting:
                        waiting.append(number)

    # --- requests ----------------------------------------------------------------------------------------------------

    def ask(self, machine: Machine, do: Callable[[], T], *, again: Callable[[BaseException], T] | None = None) -> T:
        """A request with its retries, as a store's client makes it; `again` judges a refusal after a lost answer."""
        is_lost = False
        for attempt in itertools.count(1):
            kind = self._request(machine)
            is_end = kind in ("fatal", "deadly")
            arrives = kind not in ("throttled", "dropped") and not (is_end and self.random.random() < 0.5)
            if arrives:
                try:
                    result = do()
                except WeightopsError as error:
                    if not is_lost or again is None:
                        raise
                    result = again(error)
                if kind != "lost" and not is_end:
                    return result
                is_lost = True
            if (is_end or attempt >= _TRIES) and self.may_lose(machine):
                self.faults["deaths" if kind == "deadly" else "given up"] += 1
                if kind == "deadly":
                    machine.is_dead = True
                    raise Died
                raise NetworkFailed("the store does not answer")
            self.clock.sleep(2.0 ** min(attempt, _TRIES))
            self._refuse_dead(machine)
        raise AssertionError

    def _request(self, machine: Machine) -> str:
        """Let a request take its time; what becomes of it."""
        self._refuse_dead(machine)
        draw, rates = self.random.random(), vars(self.rates)
        kind = next((k for k, end in zip(rates, itertools.accumulate(rates.values()), strict=True) if draw < end), "")
        if int(self.clock.now) != self._second:
            self._second, self._requests = int(self.clock.now), 0
        self._requests += 1
        if self._requests > self.requests_per_s:
            kind = "throttled"
        if kind == "freezing" and not self.may_lose(machine, anyway=True):
            kind = ""
        if kind not in ("", "fatal", "deadly"):
            self.faults[kind] += 1
        takes_s = {"slow": 30.0, "freezing": _FROZEN_S}.get(kind, 0.02)
        self.clock.sleep(takes_s * self.random.uniform(0.5, 1.5))
        self._refuse_dead(machine)
        return kind

    def carry(self, machine: Machine, nbytes: int) -> None:
        """Wait until so many bytes have gone through the machine's link, and through what all share."""
        self._free_at = max(self._free_at, self.clock.now) + nbytes * self.scale / self.store_nbytes_per_s
        alone_s = nbytes * self.scale / self.link_nbytes_per_s
        self.clock.sleep(max(alone_s, self._free_at - self.clock.now))
        self._refuse_dead(machine)

    def _refuse_dead(self, machine: Machine) -> None:
        if machine.is_dead:
            raise Died
