"""Writing a job: plans, cut into groups that any process can carry out alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from weightops.engine.control import Control
from weightops.engine.ending import ending_of
from weightops.engine.job.documents import (
    FINISHED,
    JOB,
    Group,
    Job,
    JobOutput,
    ending_name,
    group_name,
    is_of_job,
    read_job,
)
from weightops.engine.job.finish import abandon, made_already
from weightops.engine.job.place import OpenJob, absolute, is_own, open_outputs, refuse_places
from weightops.engine.joint import group
from weightops.engine.kinds import modules_of
from weightops.engine.proof import to_be_proven, unproven
from weightops.errors import OutputExists, PlanDiffers
from weightops.formats.job_owner import JobOwner
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.measures.witness import Witness
from weightops.plan import Plan, Shard, digest_of
from weightops.stores.store import WritableStore
from weightops.stores.stores import Stores
from weightops.version import __version__

_CHECKED_NBYTES = 5_000_000_000
"""What one group checks at most that no shard reads anyway: about what a shard has."""


@dataclass(frozen=True)
class Wanted:
    """An output of a job, and the plan of it."""

    out: str
    plan: Plan
    overwrite: bool = False


def write_job(place: str, wanted: Sequence[Wanted], control: Control, *, restart: bool = False) -> OpenJob:
    """Write what workers need to make all that is wanted, and claim the outputs; what is there already is kept.

    A job that has made an output does not make it again, whatever may be overwritten.

    Raises `PlanDiffers` for another job in that place, `OutputExists` for a folder with anything else in it, `Locked`
    and `OutputExists` for outputs that are not to be had, `UsageError` as `refuse_places` does.
    """
    place = absolute(place)
    outputs = tuple(
        JobOutput(
            out=absolute(each.out),
            is_file=each.plan.is_file,
            overwrite=each.overwrite,
            fingerprint=each.plan.fingerprint,
        )
        for each in wanted
    )
    refuse_places(place, outputs, (file for each in wanted for file in each.plan.sources))
    plans = [each.plan for each in wanted]
    groups = _divide(plans)
    warnings = unproven(tensor for members in groups for tensor in members.tensors)
    fingerprint = digest_of([[o.out, o.overwrite, o.fingerprint] for o in outputs])
    document = Job(fingerprint=fingerprint, version=__version__, outputs=outputs, groups=len(groups), warnings=warnings)
    store = control.stores.writable(place)
    _begin(store, place, document, control.stores, restart=restart)
    job = OpenJob(place, control.stores, store)
    if job.is_own and store.find(FINISHED) is not None:
        return job  # an earlier call was stopped when all but its traces was done
    made = made_already(job)
    for number, output in enumerate(job.outputs):
        if number not in made:
            output.claim(restart=restart)
    there = set(store.listed(""))
    for number, members in enumerate(groups):
        control.check()
        if group_name(number) not in there:
            store.put(group_name(number), msgspec.json.encode(_described(fingerprint, members)))
    for number, plan in enumerate(plans):
        if ending_name(number) not in there:
            store.put(ending_name(number), msgspec.json.encode(ending_of(plan)))
    return job


def _begin(store: WritableStore, place: str, document: Job, stores: Stores, *, restart: bool) -> None:
    """Have the place for this job, which may be there from an earlier call."""
    found = store.find(JOB)
    is_other = found is not None and read_job(store) != document
    if is_other and restart and any(is_own(place, output) for output in document.outputs):
        abandon(place, Control(stores=stores))
        found, is_other = None, False
    if found is None:
        odd = next((name for name in store.listed("") if not is_of_job(name)), None)
        if odd is not None or store.find(FINISHED) is not None:
            raise OutputExists(
                f"{store.shown} holds {escape(odd or FINISHED)}, and a job needs a folder of its own",
                hint="choose another --job",
            )
        for output in open_outputs(place, document, stores):
            output.refuse_taken()
        store.probe()
        try:
            store.create(JOB, msgspec.json.encode(document))
        except OutputExists:  # somebody else writes one at this moment
            is_other = read_job(store) != document
    if is_other:
        _refuse_other(place, document, read_job(store))


def _refuse_other(place: str, document: Job, found: Job) -> None:
    """Raise what it means that another job lies in a place."""
    mine = next((output.out for output in document.outputs if is_own(place, output)), None)
    if mine is not None:
        raise JobOwner(job=place, fingerprint=found.fingerprint).claimed(escape(mine))
    raise PlanDiffers(
        f"{escape(place)} holds another job",
        hint="choose another --job, or give that one up with `weightops finish JOB --abandon`",
    )


@dataclass(frozen=True)
class _Members:
    """What a group is made of: shards by the number of their output, tensors to be read, files to be proven."""

    parts: Mapping[int, Plan]
    watch: Sequence[LazyTensor] = ()
    prove: Sequence[SourceFile] = ()

    @property
    def tensors(self) -> Iterator[LazyTensor]:
        """All that is read, in the order in which it is."""
        for plan in self.parts.values():
            yield from (tensor for _, tensor in plan.tensors)
        yield from self.watch


def _described(job: str, members: _Members) -> Group:
    return Group(
        job=job,
        modules=modules_of(part.op for tensor in members.tensors for part in tensor.walk()),
        parts={number: plan.to_json() for number, plan in members.parts.items()},
        watch=tuple(tensor.to_json() for tensor in members.watch),
        prove=tuple(members.prove),
    )


def _divide(plans: Sequence[Plan]) -> list[_Members]:
    """The groups: shards as one run would write them, then what is to be watched or proven and no shard reads whole.

    Nothing of a job has its name before all of it is there. So what has to be as expected is not read beforehand:
    the shard that reads a tensor first holds it against its digest.
    """
    watch = dict.fromkeys(tensor for plan in plans for tensor in plan.watch)
    waiting: dict[LazyTensor, LazyTensor] = {}
    for tensor in watch:
        if isinstance(tensor.op, Witness) and tensor.op.is_needed:
            waiting.setdefault(tensor.inputs[0], tensor)
    could_be_met = set(waiting.values())
    found = []
    for places in group([[shard.tensors.values() for shard in plan.shards] for plan in plans]):
        shards: dict[int, list[Shard]] = {}
        for output, position in places:
            shard = plans[output].shards[position]
            shards.setdefault(output, []).append(_watching(shard, waiting))
        found.append(_Members({output: plans[output].part(each) for output, each in shards.items()}))
    met = could_be_met.difference(waiting.values())
    found += [_Members({}, watch=part) for part in _portions(t for t in watch if t not in met)]
    files = to_be_proven(tensor for members in found for tensor in members.tensors)
    return found + [_Members({}, prove=(file,)) for file in files]


def _watching(shard: Shard, waiting: dict[LazyTensor, LazyTensor]) -> Shard:
    """The shard, with each passing witness of a tensor that waits for one replaced by the one that it waits for."""
    done: dict[LazyTensor, LazyTensor] = {}

    def rebuild(tensor: LazyTensor) -> LazyTensor:
        if tensor not in done:
            if isinstance(tensor.op, Witness) and not tensor.op.is_needed and tensor.inputs[0] in waiting:
                done[tensor] = waiting.pop(tensor.inputs[0])
            else:
                inputs = tuple(map(rebuild, tensor.inputs))
                done[tensor] = tensor if inputs == tensor.inputs else LazyTensor(tensor.op, inputs, tensor.spec)
        return done[tensor]

    return Shard(shard.name, {name: rebuild(tensor) for name, tensor in shard.tensors.items()}) if waiting else shard


def _portions(tensors: Iterable[LazyTensor]) -> Iterator[list[LazyTensor]]:
    """The tensors in lists of about so many bytes as a shard has."""
    part: list[LazyTensor] = []
    nbytes = 0
    for tensor in tensors:
        nbytes += tensor.nbytes
        if part and nbytes > _CHECKED_NBYTES:
            yield part
            part, nbytes = [], tensor.nbytes
        part.append(tensor)
    if part:
        yield part
