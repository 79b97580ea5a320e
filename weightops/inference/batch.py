"""Many prompts from a file, their answers to a file: one load of the model, and a killed run goes on where it was.

The file of answers is JSON lines. The first says which job it belongs to: a digest of the model's content, the prompts
and the settings. An answer is one line, written whole and synced before the next prompt is begun.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from weightops.engine.control import Control
from weightops.engine.finished import sources_mark
from weightops.engine.sample import sample
from weightops.errors import CorruptInput, Interrupted, Locked, OutputExists, PlanDiffers, WeightopsError
from weightops.formats.sidecars import Kind, kind_of
from weightops.inference.answers import Refusal, Scored
from weightops.inference.events import Finish, Finished, Token
from weightops.inference.loaded import Loaded
from weightops.inference.opened import Opened
from weightops.inference.prompt_file import Wanted
from weightops.inference.prompts import Prompted, prompted_all
from weightops.io.atomic import write_all
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.platform.files import flush, open_to_write, read_at, try_lock
from weightops.io.strict_json import as_json
from weightops.plan import digest_of, sources_of
from weightops.stores.reader import FileReader
from weightops.version import __version__

_CHANGING = {Kind.CONFIG, Kind.GENERATION, Kind.TOKENIZER, Kind.TEMPLATE}
"""Files beside the weights that change what is said."""


class AnswersDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-answers/1"):
    """The first line of a file of answers: how many prompts it is for, which model, and a digest of all that matters.

    `job` is SHA-256 over the model's content (samples of all tensors; config and tokenizer files), the prompts with
    their settings, the number type, the device, the engine and the version.
    """

    job: str
    model: str
    prompts: int
    dtype: str
    device: str
    version: str


class AnswerDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-answer/1"):
    """One of the other lines: `index` counts prompts from 0, `id` is what the prompt's line had for it.

    `finish` says how it ended: "eos", "stop", "length", or "failed", which has `error` in the place of all the rest.
    """

    index: int
    id: str | int | None
    finish: Finish | str
    text: str = ""
    prompt_tokens: int = 0
    tokens: tuple[int, ...] = ()
    elapsed_s: float = 0.0
    logprobs: tuple[Scored, ...] | msgspec.UnsetType = msgspec.UNSET
    error: Refusal | msgspec.UnsetType = msgspec.UNSET


class BatchDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-batch/1"):
    """What `generate --prompts --json` prints: how many prompts ended how, and how many of them an earlier run did."""

    out: str
    prompts: int
    resumed: int
    finishes: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def failed(self) -> int:
        """How many prompts have no answer."""
        return self.finishes.get("failed", 0)


def answer_all(
    opened: Opened, wanted: Sequence[Wanted], out: Path, *, room: int, control: Control | None = None
) -> BatchDocument:
    """Answer prompts, in their order, and write the answers; those that are in the file already are left alone.

    A prompt that cannot be answered is so recorded, and the others go on. Raises `OutputExists` for a file that is not
    ours, `PlanDiffers` for one of another job, `Locked` while another run writes it, `NoRoom` as `Opened.placement`.
    """
    control = control or Control()
    header = AnswersDocument(
        job=_job(opened, wanted),
        model=opened.checkpoint.name,
        prompts=len(wanted),
        dtype=str(opened.model.dtype).removeprefix("torch."),
        device=opened.model.device,
        version=__version__,
    )
    with _answers(out, header) as (fd, done):
        finishes = Counter(done.values())
        resumed = len(done)
        left = [each for each in wanted if each.index not in done]
        asked = prompted_all(opened, [each.prompt for each in left])
        ready: list[tuple[Wanted, Prompted]] = []
        longest, beams = 0, 1
        for each, prompt in zip(left, asked, strict=True):
            try:
                if isinstance(prompt, WeightopsError):
                    raise prompt
                count = opened.max_new_tokens(prompt.tokens, each.settings.max_new_tokens)
            except WeightopsError as error:
                _write(out, fd, _refused(each, error))
                finishes["failed"] += 1
                continue
            longest, beams = max(longest, len(prompt.tokens) + count), max(beams, each.settings.num_beams)
            ready.append((each, prompt))
        if ready:
            placement = opened.placement(room, longest, beams)
            with control.stores.connected(), Loaded(opened, placement) as loaded:
                for each, prompt in ready:
                    answer = _answer(loaded, each, prompt)
                    _write(out, fd, answer)
                    finishes[str(answer.finish)] += 1
    return BatchDocument(
        out=str(out), prompts=len(wanted), resumed=resumed, finishes=dict(finishes), warnings=opened.warnings
    )


def _answer(loaded: Loaded, wanted: Wanted, prompt: Prompted) -> AnswerDocument:
    scored: list[Scored] = []
    try:
        for event in loaded.generate(prompt.tokens, prompt.settings(wanted.settings), ends=prompt.ends):
            if isinstance(event, Token) and event.logprob is not None:
                text = loaded.opened.text_of(event.id)
                scored.append(Scored(id=event.id, text=text, logprob=event.logprob, top=event.top))
    except Interrupted:
        raise
    except WeightopsError as error:
        return _refused(wanted, error)
    assert isinstance(event, Finished)
    return AnswerDocument(
        index=wanted.index,
        id=wanted.id,
        finish=event.finish,
        text=event.text,
        prompt_tokens=event.prompt_tokens,
        tokens=event.tokens,
        elapsed_s=round(event.elapsed_s, 3),
        logprobs=tuple(scored) if wanted.settings.logprobs is not None else msgspec.UNSET,
    )


def _refused(wanted: Wanted, error: WeightopsError) -> AnswerDocument:
    refusal = Refusal(error=type(error).__name__, message=str(error))
    return AnswerDocument(index=wanted.index, id=wanted.id, finish="failed", error=refusal)


def _job(opened: Opened, wanted: Sequence[Wanted]) -> str:
    """A digest of all that the answers depend on."""
    checkpoint = opened.checkpoint
    with FileReader() as files:
        samples = {"": sample(checkpoint.values(), files)}
    remote = tuple(file for file in sources_of(checkpoint.values()) if file.is_remote)
    names = sorted(name for name in checkpoint.sidecars if kind_of(name) in _CHANGING)
    beside = [[name, (checkpoint.sidecar(name) or b"").hex()] for name in names]
    model = opened.model
    return digest_of(
        [
            sources_mark(samples, remote),
            sorted(checkpoint),
            beside,
            [each.document() for each in wanted],
            [str(model.dtype), model.device, opened.engine, __version__],
        ]
    )


@contextmanager
def _answers(out: Path, header: AnswersDocument) -> Iterator[tuple[int, dict[int, str]]]:
    """The file of answers, locked, and how each prompt ended that has one; a line that was not finished is cut off."""
    try:
        fd = open_to_write(out, read=True, append=True)
    except OSError as error:
        raise write_failure(out, error) from None
    try:
        if try_lock(fd) is False:
            raise Locked(f"{escape(str(out))}: another run writes to it", hint="wait for it, or name another --out")
        data = _read(fd)
        lines = data.split(b"\n")
        whole = len(data) - len(lines.pop())
        if not data or (whole == 0 and _line(header).startswith(data)):
            os.ftruncate(fd, 0)
            _write(out, fd, header)
            yield fd, {}
            return
        done = _done(out, lines, header)
        os.ftruncate(fd, whole)
        yield fd, done
    finally:
        os.close(fd)


def _done(out: Path, lines: Sequence[bytes], header: AnswersDocument) -> dict[int, str]:
    shown = escape(str(out))
    try:
        found = msgspec.json.decode(lines[0] if lines else b"", type=AnswersDocument)
    except msgspec.MsgspecError:
        raise OutputExists(f"{shown}: is there, and is no file of answers", hint="name another --out") from None
    if found.job != header.job:
        raise PlanDiffers(
            f"{shown}: has answers of another job: model, prompts or settings were others",
            hint="name another --out, or remove the file",
        )
    done: dict[int, str] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            answer = msgspec.json.decode(line, type=AnswerDocument)
        except msgspec.MsgspecError as error:
            raise CorruptInput(f"{shown}: line {number} is no answer: {escape(str(error))}") from None
        done[answer.index] = str(answer.finish)
    return done


def _read(fd: int) -> bytes:
    data, buffer = bytearray(), bytearray(1 << 20)
    while count := read_at(fd, memoryview(buffer), len(data)):
        data += buffer[:count]
    return bytes(data)


def _line(document: msgspec.Struct) -> bytes:
    return json.dumps(as_json(document), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _write(out: Path, fd: int, document: msgspec.Struct) -> None:
    """One line, on disk when this returns."""
    try:
        write_all(fd, _line(document))
        flush(fd)
    except OSError as error:
        raise write_failure(out, error) from None
