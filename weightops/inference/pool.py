"""Several models in so much memory: one thread that runs them, a queue of what is asked, and events for whoever asked.

Weights, caches and what computing takes are counted before a text begins. Models that fit together stay in memory, and
their texts come by turns: a token of each, or as many as a moment is enough for. Where they do not, the one that was
used longest ago gives way; texts that wait for memory begin in the order in which they were asked for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightops.engine.control import Control
from weightops.errors import Interrupted, UsageError
from weightops.inference.events import Event, Finished, Token, failed
from weightops.inference.jobs import Deliver as Deliver
from weightops.inference.jobs import Job
from weightops.inference.jobs import Request as Request
from weightops.inference.jobs import Texts as Texts
from weightops.inference.loaded import Loaded
from weightops.inference.opened import Opened, room_on
from weightops.inference.prompts import Prompted, prompted
from weightops.inference.templates.template import Template, find_template
from weightops.io.escape import escape
from weightops.io.platform.machine import release_freed

_KEPT_PROMPTS = 4
"""Texts of each model whose keys and values are kept, if there is memory."""


TURN_S = 0.02
"""How long a text goes on before the next has its turn: shorter than anybody sees.

A small model makes several tokens in that time, with weights that stay in the processor's cache between them.
"""


class Stoppable(Control):
    """A control that also stops what it is given to once `asks` says so: a load, or a layer that is read from disk."""

    def __init__(self, parent: Control | None = None) -> None:
        super().__init__(parent=parent)
        self.asks: Callable[[], bool] = lambda: False

    def check(self) -> None:
        super().check()
        if self.asks():
            raise Interrupted(2)


@dataclass(frozen=True)
class ModelPlan:
    """What a pool will do with a model: bytes in memory, and whether it stays there beside all others."""

    name: str
    nbytes: int
    is_packed: bool
    streams_weights: bool
    stays: bool


class Pool:
    """Models by name, opened already, in `max_nbytes` of memory beside the program itself (by default what is free).

    Everything that computes is done by one thread; `submit` and `close` may be called from any. The models must have
    been opened with a control of kind `Stoppable`, if loading is to end when a text is cancelled. A text gives way to
    the next after each piece of its prompt, after its first token, and then once its turn has lasted `turn_s`.
    """

    def __init__(self, models: Mapping[str, Opened], max_nbytes: int | None = None, *, turn_s: float = TURN_S) -> None:
        if not models:
            raise UsageError("there is no model")
        self._models, self._turn_s = dict(models), turn_s
        self.max_nbytes = max_nbytes if max_nbytes is not None else _room(models.values())
        self._loaded: dict[str, Loaded] = {}
        """By name; the one used last comes last."""
        self._waiting: deque[Job] = deque()
        self._live: list[Job] = []
        self._changed = threading.Condition()
        self._new: list[Job] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="weightops-pool", daemon=True)
        self._thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, in the order in which they were given."""
        return tuple(self._models)

    def model(self, name: str) -> Opened:
        """A model; raises `UsageError` for a name that there is not."""
        if name not in self._models:
            raise UsageError(f"there is no model {escape(name)}", hint=f"choose from {', '.join(self._models)}")
        return self._models[name]

    def find_template(self, name: str, template: str | Path) -> Template:
        """The template of a model, by name or file; raises as `templates.template.find_template` does."""
        opened = self.model(name)
        return find_template(template, opened.tokenizer, opened.shown)

    def plan(self, tokens: int = 2048) -> tuple[ModelPlan, ...]:
        """What will be in memory, for texts of so many tokens, or of as many as a model was made for.

        Raises `NoRoom` for a model that does not fit at all.
        """
        lengths = {name: min(tokens, each.model.max_positions or tokens) for name, each in self._models.items()}
        found = {name: each.placement(self.max_nbytes, lengths[name]) for name, each in self._models.items()}
        beside = sum(each.beside_nbytes(lengths[name]) for name, each in self._models.items())
        together = sum(each.nbytes for each in found.values()) + beside <= self.max_nbytes
        return tuple(
            ModelPlan(name, each.nbytes, each.is_packed, each.streams_weights, together) for name, each in found.items()
        )

    @property
    def nbytes(self) -> int:
        """Bytes that weights, caches and live texts are counted with now."""
        return sum(each.nbytes for each in list(self._loaded.values())) + sum(job.nbytes for job in list(self._live))

    @property
    def waiting(self) -> int:
        """How many texts have not begun."""
        return len(self._waiting) + len(self._new)

    @property
    def live(self) -> int:
        """How many texts are being made."""
        return len(self._live)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The models whose weights are in memory."""
        return tuple(self._loaded)

    def submit(self, requests: Sequence[Request], deliver: Deliver | None = None) -> Texts:
        """Ask for texts, whose columns are their numbers in the list.

        Their events come from iterating over the result, or, with `deliver`, by its being called in the pool's thread,
        which it must not hold up; the result must then be kept for as long as they are wanted. Prompts become tokens in
        the thread that calls, which takes a moment. What is wrong with a request is its event `Failed`. Raises
        `UsageError` for a name that there is not.
        """
        for request in requests:
            self.model(request.model)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        to = deliver or events.put
        jobs = []
        for column, request in enumerate(requests):
            try:
                jobs.append(self._job(request, column, to))
            except Exception as error:
                to(failed(error, column))
        with self._changed:
            if self._is_closed:
                raise UsageError("the models are closed already")
            self._new += jobs
            self._changed.notify()
        return Texts({job.column: job.cancelled for job in jobs}, len(requests), events, self._wake)

    def _job(self, request: Request, column: int, to: Deliver) -> Job:
        """A request with what it needs; raises for one that cannot be."""
        opened, settings = self._models[request.model], request.settings
        found = request.prompt if isinstance(request.prompt, Prompted) else prompted(opened, request.prompt)
        tokens = len(found.tokens) + opened.max_new_tokens(found.tokens, settings.max_new_tokens)
        placement = opened.placement(self.max_nbytes, tokens, settings.num_beams)
        return Job(request, column, to, found, placement, opened.beside_nbytes(tokens, settings.num_beams))

    def cancel(self) -> None:
        """Cancel all texts; from any thread, a signal handler's too."""
        for job in [*self._new, *self._waiting, *self._live]:
            job.cancelled.set()
        self._wake()

    def close(self) -> None:
        """Cancel what is not finished, wait for its last events, and give all memory back."""
        with self._changed:
            self._is_closed = True
        self._wake()
        self._thread.join()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        while self._next():
            for job in list(self._waiting):
                if self._is_over(job):
                    self._waiting.remove(job)
                    self._end(job)
            self._admit()
            for job in list(self._live):
                self._step(job)
        for loaded in self._loaded.values():
            loaded.close()
        self._loaded.clear()

    def _next(self) -> bool:
        """Take what is new, wait while there is nothing to do; whether there will be more."""
        with self._changed:
            while not (self._new or self._live or self._waiting or self._is_closed):
                self._changed.wait()
            new, self._new = self._new, []
            self._waiting += new
            return not self._is_closed or bool(self._waiting or self._live)

    def _admit(self) -> None:
        """Begin the texts that wait, as far as there is memory, in their order."""
        while self._waiting:
            job = self._waiting[0]
            try:
                if not self._begin(job):
                    for each in list(self._waiting)[1:]:
                        each.wait("queue")
                    return
                self._live.append(job)
            except Exception as error:
                self._end(job, error)
            self._waiting.popleft()

    def _begin(self, job: Job) -> bool:
        """Whether a text has begun; if not, others hold what it needs."""
        name, opened = job.request.model, self._models[job.request.model]
        loaded = self._loaded.get(name)
        if loaded is not None and (loaded.placement != job.placement or loaded.is_exclusive):
            if any(each.request.model == name for each in self._live):
                job.wait("queue")
                return False
            if loaded.placement != job.placement:
                self._unload(name)
                loaded = None
        if not self._make_room(job.nbytes + (job.placement.nbytes if loaded is None else 0), name):
            job.wait("memory")
            return False
        if loaded is None:
            job.wait("loading")
            loaded = self._load(job, opened)
        self._loaded[name] = self._loaded.pop(name)  # the one used last comes last
        job.events = loaded.generate(
            job.prompted.tokens,
            job.prompted.settings(job.request.settings),
            ends=job.prompted.ends,
            column=job.column,
            is_cancelled=lambda: self._is_over(job),
        )
        return True

    def _load(self, job: Job, opened: Opened) -> Loaded:
        self._listen(opened, job)
        with opened.control.stores.connected():
            loaded = Loaded(opened, job.placement, kept_prompts=_KEPT_PROMPTS)
        self._loaded[job.request.model] = loaded
        return loaded

    def _make_room(self, nbytes: int, keep: str) -> bool:
        """Give back what is not in use, longest ago first, until there is so much room; whether there is."""
        busy = {job.request.model for job in self._live}
        for name in list(self._loaded):
            if self.nbytes + nbytes <= self.max_nbytes:
                return True
            self._loaded[name].prompts.clear()
            if self.nbytes + nbytes > self.max_nbytes and name not in busy and name != keep:
                self._unload(name)
        return self.nbytes + nbytes <= self.max_nbytes

    def _unload(self, name: str) -> None:
        self._loaded.pop(name).close()
        release_freed()

    def _step(self, job: Job) -> None:
        """The turn of a text."""
        self._listen(self._models[job.request.model], job)
        events, end_s, goes_on = job.events, time.monotonic() + self._turn_s, True
        assert events is not None
        while goes_on:
            try:
                event = next(events)
            except Exception as error:
                self._live.remove(job)
                self._end(job, error)
                return
            goes_on = isinstance(event, Token) and job.has_spoken and time.monotonic() < end_s
            job.has_spoken |= isinstance(event, Token)
            if isinstance(event, Finished):
                self._live.remove(job)
                job.events = None
            job.deliver(event)

    def _listen(self, opened: Opened, job: Job) -> None:
        """While this text is at work, it is its being cancelled that stops reading."""
        if isinstance(opened.control, Stoppable):
            opened.control.asks = lambda: self._is_over(job)

    def _is_over(self, job: Job) -> bool:
        return self._is_closed or job.cancelled.is_set()

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """The last event of a text that did not come to its end by itself."""
        job.events = None
        if error is None or (isinstance(error, Interrupted) and self._is_over(job)):
            event: Event = Finished(
                column=job.column,
                finish="cancelled",
                text="",
                tokens=(),
                prompt_tokens=len(job.prompted.tokens),
                cached_tokens=0,
                first_token_s=None,
                elapsed_s=0.0,
            )
        else:
            event = failed(error, job.column)
        job.deliver(event)


def _room(models: Iterable[Opened]) -> int:
    return min(map(room_on, {each.model.device for each in models}))
