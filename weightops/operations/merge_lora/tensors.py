"""The tensors of a merged model: what adapters replace, what they add to, and embeddings that are tied or no longer."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import Adapter
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.operations.merge_lora.names import Names, find_embeddings, find_tensor, is_head, name_head
from weightops.operations.merge_lora.parts import Placed, Placing
from weightops.ops.arrange import Agreed, cut
from weightops.ops.elementwise import cast
from weightops.ops.lora.dora import merge, steps
from weightops.ops.lora.factors import LoraBias, Precision, ReplaceRows

_WRONG_BASE = "is this the base that the adapter was trained on?"


class Merging:
    """The tensors of a base, and what adapters do to each.

    Where embeddings are tied and stay so, they are one tensor, and what is done to either is done to that. They are
    untied where an adapter holds one of them whole in its `modules_to_save`, unless it has `ensure_weight_tying`.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter], precision: Precision, two: bool) -> None:
        self._base, self._adapters, self._precision, self._two = base, adapters, precision, two
        model = base.config().get("model_type")
        self._model = model if isinstance(model, str) else None
        self._names = Names(base, self._paths())
        self._embeddings = find_embeddings(base)
        self._is_shared = self._embeddings.is_tied
        self._saved: set[str] = set()
        self.notes: list[str] = []
        self._values: dict[str, LazyTensor] = dict(base)
        self.is_untied = self._share()
        self._load()
        self._fit_vocabulary()
        changes: dict[str, list[tuple[Adapter, Placed]]] = {}
        for adapter in adapters:
            placing = Placing(adapter, self._values, self._find, self._model, precision, two)
            for placed in placing.place():
                changes.setdefault(placed.name, []).append((adapter, placed))
        for name, own in changes.items():
            self._merge(name, own)
        self._replace_rows(changes.keys())

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """The merged tensors by name, in the base's order; an output embedding that got its own comes last."""
        ordered = {name: self._values[self._slot(name)] for name in self._base}
        return ordered | {name: tensor for name, tensor in self._values.items() if name not in ordered}

    @property
    def changes(self) -> list[tuple[LazyTensor, LazyTensor]]:
        """What the base has and what comes out, where the two are not one lazy tensor; small ones first."""
        pairs = [(self._base[self._base_name(name)], tensor) for name, tensor in self.tensors.items()]
        return sorted(((old, new) for old, new in pairs if old != new), key=lambda pair: pair[1].nbytes)

    @property
    def vocab_size(self) -> int | None:
        """The number of rows of the input embedding, if it is another than that of the base."""
        name = self._embeddings.embedding
        if name is None or self._values[name].spec.shape == self._base[name].spec.shape:
            return None
        return self._values[name].spec.shape[0]

    def _paths(self) -> Iterator[str]:
        """Every path that an adapter has, of tensors."""
        for adapter in self._adapters:
            yield from (f"{path}.weight" for path, _ in adapter.factors)
            yield from (f"{path}.weight" for path in adapter.rows)
            yield from (*adapter.base, *adapter.whole)

    def _slot(self, name: str) -> str:
        """Where the tensor of this name is: tied ones are in one place."""
        embedding = self._embeddings.embedding
        return embedding if self._is_shared and embedding is not None and name == self._embeddings.head else name

    def _find(self, path: str) -> str | None:
        """The tensor that `path` is, None if there is none."""
        name = find_tensor(self._names, self._embeddings, path)
        return None if name is None else self._slot(name)

    def _must_find(self, adapter: Adapter, path: str) -> str:
        name = self._find(path)
        file = adapter.files.get(path)
        if name is None and file is not None:
            raise IncompatibleInputs(
                f"{escape(adapter.name)}/{escape(file)}: was trained with the adapter and holds {escape(path)}, which "
                "the base does not have",
                hint=f"give a base that has it, or move {escape(file)} out of the folder to merge without it",
            )
        if name is None:
            raise IncompatibleInputs(
                f"{escape(adapter.name)}: holds {escape(path)}, which the base does not have",
                hint=f"{_WRONG_BASE} Heads of other tasks are merged with peft itself",
            )
        return name

    def _share(self) -> bool:
        """Decide whether the embeddings are one tensor; says whether they were and are no longer."""
        known = self._embeddings
        touched = {self._find(path) for path in self._paths()}
        own = [path for adapter in self._adapters for path in self._own(adapter) if known.is_tied]
        if own and known.head is None and known.embedding is not None:
            known.head = name_head(known.embedding, self._base.config())
        if own and known.head is None:
            raise IncompatibleInputs(
                f"{escape(own[0])} is no longer tied, and what the output embedding is called is not known",
                hint="give a base in which both embeddings are written out",
            )
        if known.head is None or known.embedding is None or not known.is_tied:
            return False
        self._is_shared = not own and known.embedding in touched
        if own and known.head not in self._base:
            self._values[known.head] = self._base[known.embedding]
        elif self._is_shared and known.head in self._base:
            first, second = self._base[known.embedding], self._base[known.head]
            if first != second:
                problem = f"{self._base.name}: {known.embedding} and {known.head}, which config.json ties"
                self._values[known.embedding] = LazyTensor.make(Agreed(problem), first, second)
        return bool(own)

    def _own(self, adapter: Adapter) -> list[str]:
        """The embeddings that an adapter holds apart, whole."""
        if adapter.config.ensure_weight_tying:
            return []
        saved = [path for path in adapter.whole if adapter.is_saved_whole(path)]
        return [path for path in saved if self._find(path) in self._embeddings.names]

    def _load(self) -> None:
        """Put in place what adapters hold of the base itself; what of this is saved whole is not merged into."""
        loaded: dict[str, tuple[Adapter, str]] = {}
        for adapter in self._adapters:
            for path, tensor in sorted({**adapter.base, **adapter.whole}.items(), key=lambda item: is_head(item[0])):
                name = self._must_find(adapter, path)
                is_saved = path in adapter.whole and self._is_saved(adapter, path)
                new = self._fitted(adapter, path, name, tensor)
                earlier, other = loaded.get(name, (None, ""))
                if earlier is adapter and is_saved:
                    problem = f"{adapter.name}: {other} and {path}, which ensure_weight_tying ties"
                    new = LazyTensor.make(Agreed(problem), self._values[name], new)
                elif earlier is not None and earlier is not adapter:
                    if is_saved or name in self._saved:
                        raise IncompatibleInputs(
                            f"{escape(earlier.name)} and {escape(adapter.name)} both replace {escape(name)}",
                            hint="merge the first into the base, and the second into the result",
                        )
                    self.notes.append(f"{escape(name)} is that of {escape(adapter.name)}, the last that has it")
                loaded[name] = (adapter, path)
                self._values[name] = new
                if is_saved:
                    self._saved.add(name)
            self._check_saved(adapter, {name for name, (of, _) in loaded.items() if of is adapter})

    def _is_saved(self, adapter: Adapter, path: str) -> bool:
        """Whether a tensor is of a module in `modules_to_save`, or tied to one: then peft 0.21 does not list it."""
        ties = adapter.config.ensure_weight_tying and bool(adapter.config.modules_to_save)
        is_tied = ties and self._find(path) in self._embeddings.names and self._embeddings.is_tied
        return adapter.is_saved_whole(path) or is_tied

    def _check_saved(self, adapter: Adapter, loaded: Container[str]) -> None:
        """Refuse an adapter that lacks a tensor of a module in its `modules_to_save`."""
        for name in self._base:
            is_lacking = adapter.is_saved_whole(name) and self._slot(name) not in loaded
            if is_lacking and adapter.is_saved_whole(self._names.as_loaded(name)):
                raise CorruptInput(
                    f"{escape(adapter.name)}: lacks {escape(name)}, whose module {CONFIG_NAME} has in modules_to_save",
                    hint="fetch the adapter again",
                )

    def _fitted(self, adapter: Adapter, path: str, name: str, tensor: LazyTensor) -> LazyTensor:
        """A tensor in place of one of the base: in its dtype, and its shape but for the tokens of an embedding."""
        spec = self._base[self._base_name(name)].spec
        resizes = name in self._embeddings.names and len(tensor.spec.shape) == 2 and tensor.spec.shape[0] > 0
        if tensor.spec.shape != spec.shape and not (resizes and tensor.spec.shape[1:] == spec.shape[1:]):
            raise IncompatibleInputs(
                f"{escape(adapter.name)}: {escape(path)} is {tensor.spec}, the base's {escape(name)} is {spec}",
                hint=_WRONG_BASE,
            )
        if not spec.dtype.is_float or spec.dtype.is_packed:
            raise IncompatibleInputs(
                f"{escape(self._base.name)}: {escape(name)} is {spec}, expected floating-point numbers",
                hint="a quantised base: merge into the one it was made from",
            )
        return cast(tensor, spec.dtype)

    def _base_name(self, name: str) -> str:
        """The tensor of the base that stands for `name`, of which it may have none."""
        return name if name in self._base or self._embeddings.embedding is None else self._embeddings.embedding

    def _merge(self, name: str, own: list[tuple[Adapter, Placed]]) -> None:
        """Merge all changes of one tensor: of the input embedding first, then those of an output embedding tied to it;
        for each in the order of the adapters."""
        own = sorted(own, key=lambda pair: is_head(pair[1].path))
        is_tied = self._is_shared and name == self._embeddings.embedding
        sides = {is_head(placed.path) for _, placed in own}
        seen: set[tuple[int, bool]] = set()
        for adapter, placed in own:
            where = f"{escape(adapter.name)}: {escape(placed.path)}"
            if (id(adapter), is_head(placed.path)) in seen:
                raise CorruptInput(
                    f"{where} and another module of the adapter both are {escape(name)} of the base",
                    hint="take one of them out of the adapter",
                )
            seen.add((id(adapter), is_head(placed.path)))
            if name in self._saved:
                raise IncompatibleInputs(
                    f"{where} has factors, and the same tensor is held whole in modules_to_save",
                    hint="merge the two adapters one at a time, or with peft itself",
                )
            if is_tied and adapter.config.ensure_weight_tying:
                raise IncompatibleInputs(
                    f"{where}: with ensure_weight_tying peft adds the change of tied embeddings twice",
                    hint="run it unmerged with peft: what merging gives there is not what was trained",
                )
            if is_tied and placed.part.has_magnitude and len(sides) > 1:
                raise IncompatibleInputs(
                    f"{where}: DoRA of the one, and other factors of the other of two tied embeddings",
                    hint="`weightops shard --untie` gives the base two embeddings, each of which then gets its own",
                )
        if is_tied:
            shown = " and ".join(sorted({escape(placed.path) for _, placed in own}))
            self.notes.append(f"the embeddings are tied: what changes {shown} changes both")
        inputs = [tensor for _, placed in own for tensor in placed.inputs]
        self._values[name] = merge(self._values[name], [placed.part for _, placed in own], inputs, self._precision)
        if any(placed.bias is not None for _, placed in own):
            self._merge_biases([placed for _, placed in own], own[0][0])

    def _merge_biases(self, own: Sequence[Placed], adapter: Adapter) -> None:
        path = own[0].path.removesuffix(".weight") + ".bias"
        name = self._find(path)
        if name is None:
            raise IncompatibleInputs(
                f"{escape(adapter.name)}: has a bias for {escape(own[0].path)}, and the base has none there",
                hint="peft cannot merge such an adapter either",
            )
        numbers = {i: n for n, i in enumerate(i for i, placed in enumerate(own) if placed.bias is not None)}
        order = [(kind, numbers[i]) for kind, i in steps([p.part for p in own]) if i in numbers and kind != "note"]
        op = LoraBias(
            tuple(placed.part.scale for placed in own if placed.bias is not None),
            tuple(number if kind == "merge" else ~number for kind, number in order),
            self._precision,
        )
        biases = [placed.bias for placed in own if placed.bias is not None]
        try:
            self._values[name] = LazyTensor.make(op, self._values[name], *biases)
        except IncompatibleInputs as error:
            raise IncompatibleInputs(f"{escape(adapter.name)}: {escape(path)}: {error}", hint=_WRONG_BASE) from None

    def _replace_rows(self, merged: Container[str]) -> None:
        """Put in place the rows of `trainable_token_indices`."""
        taken: dict[tuple[str, bool], set[int]] = {}
        for adapter in self._adapters:
            done: set[str] = set()
            for path, tensor in sorted(adapter.rows.items(), key=lambda item: is_head(f"{item[0]}.weight")):
                where = f"{escape(adapter.name)}: {escape(path)}"
                name = self._must_find(adapter, f"{path}.weight")
                rows, spec = adapter.token_rows(path), self._values[name].spec
                if not rows and self._is_shared and name in done:
                    continue  # peft saves those of the input embedding once more under the head that is tied to it
                done.add(name)
                if name in merged or name in self._saved:
                    raise IncompatibleInputs(
                        f"{where} has rows of its own, and the same tensor is changed as a whole",
                        hint="peft cannot merge such adapters either",
                    )
                others = taken.setdefault((name, is_head(f"{path}.weight")), set())
                if others & set(rows):
                    raise IncompatibleInputs(
                        f"{where}: row {min(others & set(rows))} is replaced by two adapters", hint="merge one of them"
                    )
                others.update(rows)
                fits = len(set(rows)) == len(rows) and all(0 <= row < spec.shape[0] for row in rows)
                if not fits or (len(rows), *spec.shape[1:]) != tensor.spec.shape:
                    raise IncompatibleInputs(
                        f"{where}: {tensor.spec} for the {len(rows)} rows in {CONFIG_NAME}, the base's is {spec}",
                        hint=_WRONG_BASE,
                    )
                op = ReplaceRows(rows)
                self._values[name] = LazyTensor.make(op, self._values[name], cast(tensor, spec.dtype))

    def _fit_vocabulary(self) -> None:
        """Give both embeddings the number of tokens that an adapter holds one of them for.

        peft saves no embedding that has no factors, so one that was resized in training has lost its new rows.
        """
        known = self._embeddings
        if known.embedding is None or known.head is None or self._is_shared:
            return
        pair = (known.embedding, known.head)
        rows = {name: self._values[name].spec.shape[0] for name in pair}
        before = {name: self._base[self._base_name(name)].spec.shape[0] for name in pair}
        if len(set(rows.values())) == 1 or len(set(before.values())) != 1:
            return
        resized, other = pair if rows[pair[0]] != before[pair[0]] else pair[::-1]
        if rows[resized] > rows[other]:
            raise IncompatibleInputs(
                f"an adapter holds {escape(resized)} with {rows[resized]} rows, and not the new ones of "
                f"{escape(other)}, which has {rows[other]} in the base",
                hint=f"give the base as it was in training: after resize_token_embeddings({rows[resized]})",
            )
        self.notes.append(
            f"{escape(other)} is cut to the {rows[resized]} rows that an adapter has of {escape(resized)}"
        )
        self._values[other] = cut(self._values[other], 0, 0, rows[resized])
