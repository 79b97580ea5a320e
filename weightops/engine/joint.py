"""Which files are written side by side, and which of their tensors are computed together.

Several outputs are often made of the same sources: a model and its casts, a recovered base and what a LoRA makes of it.
Shards that share most are written at one time; a file takes its tensors in its own order, and where the next of two
files are made of the same, both take a block before either takes the next.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from weightops.lazy import LazyTensor

_BLOCK_NBYTES = 1 << 22
"""A block of the widest of the tensors: smaller ones stay in cache, but their threads wait more for each other."""
_MAX_FILES = 8
"""Files in one group: each takes memory, and a crash loses what of them was not finished."""


def first_read(tensor: LazyTensor) -> Hashable:
    """What tells which tensors belong together: the first range of a file that is read for it, or itself."""
    return next(((n.op.source, n.op.extent) for n in tensor.walk() if n.op.source is not None), tensor)


def interleave(sequences: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Which sequences advance in each step, so that equal keys meet in one step wherever the orders allow it.

    A sequence waits for another that holds its next key further on; where two wait for each other, the first goes on
    alone.
    """
    waiting: list[dict[Hashable, int]] = []
    for sequence in sequences:
        count: dict[Hashable, int] = {}
        for key in sequence:
            count[key] = count.get(key, 0) + 1
        waiting.append(count)
    heads = [0] * len(sequences)
    steps: list[list[int]] = []
    while active := [i for i, sequence in enumerate(sequences) if heads[i] < len(sequence)]:
        nexts = {i: sequences[i][heads[i]] for i in active}
        ready = (i for i in active if all(nexts[j] == nexts[i] for j in active if waiting[j].get(nexts[i])))
        first = next(ready, None)
        step = [active[0]] if first is None else [j for j in active if nexts[j] == nexts[first]]
        for i in step:
            waiting[i][nexts[i]] -= 1
            heads[i] += 1
        steps.append(step)
    return steps


def common_block(tensors: Sequence[LazyTensor]) -> int:
    """Elements of a block that holds whole grains of all tensors; 0 if they do not go together element by element."""
    if len({t.spec.numel for t in tensors}) > 1 or any(t.spec.dtype.is_packed or not t.nbytes for t in tensors):
        return 0
    if len(tensors) == 1 or any(t.grain % t.spec.dtype.itemsize for t in tensors):
        return 0
    grain = math.lcm(*(t.grain // t.spec.dtype.itemsize for t in tensors))
    widest = max(t.spec.dtype.itemsize for t in tensors)
    return max(1, _BLOCK_NBYTES // widest // grain) * grain


def common_nodes(tensors: Sequence[LazyTensor]) -> set[LazyTensor]:
    """What more than one of the tensors is made of: of each the outermost parts that another has too."""
    parts = [set(tensor.walk()) for tensor in tensors]
    found: set[LazyTensor] = set()

    def collect(tensor: LazyTensor) -> None:
        if sum(tensor in part for part in parts) > 1:
            found.add(tensor)
        else:
            for source in tensor.inputs:
                collect(source)

    for tensor in tensors:
        collect(tensor)
    return found


def group(outputs: Sequence[Sequence[Iterable[LazyTensor]]]) -> list[list[tuple[int, int]]]:
    """Shards to be written side by side, each as (output, position), from the tensors of every output's shards.

    The shards of the output that has the fewest are the heads of groups; each shard of the others goes along with
    the one that it shares most bytes with, as long as there are few enough in its group. What then is left over is
    grouped in the same way.
    """
    nbytes = [[{first_read(t): t.nbytes for t in tensors} for tensors in shards] for shards in outputs]
    pending = {(i, j) for i, shards in enumerate(nbytes) for j in range(len(shards))}
    groups: list[list[tuple[int, int]]] = []
    while pending:
        left = [sum(i == output for i, _ in pending) for output in range(len(outputs))]
        chosen = min((i for i, count in enumerate(left) if count), key=left.__getitem__)
        heads = {place: [place] for place in sorted(pending) if place[0] == chosen}
        for place in sorted(pending - heads.keys()):
            own = nbytes[place[0]][place[1]]

            def shared(head: tuple[int, int], own: dict[Hashable, int] = own) -> int:
                other = nbytes[head[0]][head[1]]
                return sum(size for key, size in own.items() if key in other)

            best = max(heads, key=shared)
            if shared(best) and len(heads[best]) < _MAX_FILES:
                heads[best].append(place)
        groups += heads.values()
        pending -= {place for members in heads.values() for place in members}
    return groups
