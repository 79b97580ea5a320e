"""mergekit's YAML, read into stages. Every refusal names file, line and field.

The keys are those of mergekit 0.1.5; a module may also have a `merge_method` of its own. What mergekit would pass over
in silence is refused with what could be meant, or where it belongs; what it knows and the method does not use is
accepted and listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.yaml_document import Document, Place, described, read_documents
from weightops.operations.merge.fields import FORMS, MODEL, MODULE, OF_MIXTURES, SLICE, SOURCE, TOP, belongs
from weightops.operations.merge.references import Exists, Reference, References
from weightops.operations.merge.settings import Settings, read_settings
from weightops.operations.merge.stage import Module, Slice, Source, Stage
from weightops.operations.merge.tokens import read_tokenizer
from weightops.ops.merging.method import Method
from weightops.ops.merging.methods import find_method
from weightops.spec import DType

_DTYPES = {dtype.value: dtype for dtype in (DType.F16, DType.BF16, DType.F32, DType.F64)}


def parse_stages(text: str, shown: str, exists: Exists) -> tuple[Stage, ...]:
    """The stages of a merge file, each after those that it builds on; the last is what the file makes.

    Of several documents one may lack a name: that is the last. Raises `UsageError` naming line and field.
    """
    documents = [document for document in read_documents(text, shown) if document.data]
    if not documents:
        raise UsageError(f"{shown}: is empty", hint="a merge file has merge_method and models")
    if len(documents) == 1:
        return (parse_stage(documents[0], References(exists)),)
    names: dict[str, Document] = {}
    for document in documents:
        name = document.data.get("name")
        if name is not None and document.text(("name",), name) in names:
            document.fail(("name",), f"there is a stage {escape(name)} already")
        if name is not None:
            names[name] = document
    references = References(exists, frozenset(names))
    stages = [parse_stage(document, references) for document in documents]
    unnamed = [stage for stage in stages if stage.name is None]
    if len(unnamed) > 1:
        unnamed[1].document.fail((), "is the second stage without a name", hint="all but the last need name: TEXT")
    return _ordered(stages, (unnamed or stages)[-1])


def _ordered(stages: Sequence[Stage], last: Stage) -> tuple[Stage, ...]:
    """The stages that `last` is made of, in an order in which they can be made."""
    by_name = {stage.name: stage for stage in stages if stage.name is not None}
    done: dict[str | None, Stage] = {}

    def visit(stage: Stage, above: tuple[str | None, ...]) -> None:
        if stage.name in above:
            circle = " -> ".join(escape(str(name)) for name in (*above[above.index(stage.name) :], stage.name))
            stage.document.fail(("name",), f"is made of itself ({circle})")
        for found in stage.references if stage.name not in done else ():
            if found.model in by_name:
                visit(by_name[found.model], (*above, stage.name))
        done[stage.name] = stage

    visit(last, ())
    idle = next((stage for stage in stages if stage.name not in done), None)
    if idle is not None:
        idle.document.fail(("name",), f"no other stage uses {escape(str(idle.name))}", hint="remove it, or name it")
    return tuple(done.values())


def parse_stage(document: Document, references: References) -> Stage:
    """One document, checked in all that can be told without opening a model; raises `UsageError`."""
    return _Parser(document, references).stage()


class _Parser:
    """Reads one document. Collects which models are named where, and what is not used."""

    def __init__(self, document: Document, references: References) -> None:
        self.document, self._references = document, references
        self.models: dict[Place, Reference] = {}
        self.unused: list[str] = []

    def stage(self) -> Stage:
        data, document = self.document.data, self.document
        moe = next((key for key in OF_MIXTURES if key in data), None)
        if moe is not None:
            document.fail((moe,), "is of mergekit-moe, whose files make mixtures of experts and are not read here")
        holders = tuple(key for key in data if key not in TOP and any(p[:1] == (key,) for p in document.anchored))
        self._fields((), {key: value for key, value in data.items() if key not in holders}, TOP)
        if data.get("merge_method") is None:
            document.fail((), "lacks merge_method", hint="for example merge_method: slerp")
        self.unused += [f"{key} (holds an anchor)" for key in holders]
        if len(self._references.stages) == 0 and data.get("name") is not None:
            self.unused.append("name")
        method = self._method(("merge_method",), data["merge_method"])
        base = self._model(("base_model",), data["base_model"]) if data.get("base_model") is not None else None
        modules = self._modules(data, method, base)
        choice = read_tokenizer(document, self._model)
        template = data.get("chat_template")
        name = data.get("name")
        return Stage(
            modules=modules,
            base=base,
            dtype=self._dtype("dtype"),
            out_dtype=self._dtype("out_dtype"),
            tokenizer=choice,
            chat_template=None if template is None else document.text(("chat_template",), template),
            name=None if name is None else document.text(("name",), name),
            unused=tuple(dict.fromkeys(self.unused)),
            holders=holders,
            models=self.models,
            document=document,
        )

    def _fields(self, place: Place, value: Any, known: Sequence[str]) -> Mapping[str, Any]:
        """The mapping `value`, if it has none but known fields."""
        fields = self.document.mapping(place, value)
        for key in fields:
            if key not in known:
                self.document.fail((*place, key), "unknown field", hint=belongs(key, known))
        return fields

    def _method(self, place: Place, value: Any) -> Method:
        name = self.document.text(place, value)
        try:
            return find_method(name)
        except UsageError as error:
            raise self.document.blame(place, error) from None

    def _model(self, place: Place, value: Any) -> Reference:
        found = self._references.read(self.document, place, value)
        self.models[place] = found
        return found

    def _dtype(self, key: str) -> DType | None:
        value = self.document.data.get(key)
        if value is None:
            return None
        found = _DTYPES.get(self.document.text((key,), value).removeprefix("torch."))
        if found is None:
            self.document.fail((key,), f"models are not merged in {escape(value)}", hint=f"one of {', '.join(_DTYPES)}")
        return found

    def _modules(self, data: Mapping[str, Any], method: Method, base: Reference | None) -> tuple[Module, ...]:
        form = self._form((), data, FORMS)
        fields = {"": data}
        if form == "modules":
            fields = dict(self.document.mapping(("modules",), data["modules"]))
        general: dict[str, tuple[Settings, list[str]]] = {}
        found = []
        for name, each in fields.items():
            place: Place = ("modules", name) if form == "modules" else ()
            own = method
            if form == "modules":
                self._fields(place, each, MODULE)
                if each.get("merge_method") is not None:
                    own = self._method((*place, "merge_method"), each["merge_method"])
            if own.name not in general:
                unused: list[str] = []
                general[own.name] = self._settings((), data, own, unused=unused), unused
            found.append(self._module(name, place, each, own, base, general[own.name][0]))
        lists = [unused for _, unused in general.values()]
        self.unused += [field for field in lists[0] if all(field in unused for unused in lists)]
        return tuple(found)

    def _form(self, place: Place, data: Mapping[str, Any], forms: Sequence[str]) -> str:
        """Which of the forms a mapping has; raises unless it is exactly one."""
        said = [form for form in forms if data.get(form) is not None]
        if len(said) != 1:
            found = f"has {' and '.join(said)}" if said else "has none"
            self.document.fail((*place, *said[1:2]), f"expected one of {', '.join(forms[:-1])} or {forms[-1]}, {found}")
        if not data[said[0]]:
            self.document.fail((*place, said[0]), "is empty")
        return said[0]

    def _settings(
        self, place: Place, fields: Mapping[str, Any], method: Method, *, of_source: bool = False, unused: list[str]
    ) -> Settings:
        return read_settings(
            self.document, (*place, "parameters"), fields.get("parameters"), method, of_source=of_source, unused=unused
        )

    def _module(
        self, name: str, place: Place, fields: Mapping[str, Any], method: Method, base: Reference | None, top: Settings
    ) -> Module:
        own: Settings = {}
        if place:
            own = self._settings(place, fields, method, unused=self.unused)
        form = self._form(place, fields, ("models", "slices"))
        listed = self._list((*place, form), fields[form])
        if form == "models":
            sources = [self._source((*place, form, str(i)), each, method, MODEL) for i, each in enumerate(listed)]
            joins = not (place and fields.get("merge_method") is not None and method.base == "input")
            if base is not None and joins and base not in [source.model for source in sources]:
                sources.append(Source(base, ("base_model",)))
            slices = [Slice(tuple(sources), base if method.base != "input" else None, (*place, form))]
        else:
            slices = [self._slice((*place, form, str(i)), each, method, base) for i, each in enumerate(listed)]
        for piece in slices:
            self._check(piece, method)
            ignored = [source for source in piece.sources if source.model == piece.base and source.parameters]
            self.unused += [".".join((*source.place, "parameters")) for source in ignored]
        return Module(name, method, tuple(slices), (own, top), place)

    def _list(self, place: Place, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            self.document.fail(place, f"expected a list, found {described(value)}")
        if not value:
            self.document.fail(place, "is empty")
        return value

    def _slice(self, place: Place, value: Any, method: Method, base: Reference | None) -> Slice:
        fields = self._fields(place, value, SLICE)
        if fields.get("sources") is None:
            self.document.fail(place, "lacks sources", hint="a slice has sources, each with model and layer_range")
        listed = self._list((*place, "sources"), fields["sources"])
        sources = [self._source((*place, "sources", str(i)), each, method, SOURCE) for i, each in enumerate(listed)]
        if fields.get("residual_weight") is not None:
            self.unused.append(".".join((*place, "residual_weight")))
        if fields.get("base_model") is not None:
            base = self._model((*place, "base_model"), fields["base_model"])
        parameters = self._settings(place, fields, method, unused=self.unused)
        piece = Slice(tuple(sources), base if method.base != "input" else None, place, parameters)
        lengths = [stop - first for first, stop in (source.layers or (0, 0) for source in sources)]
        odd = next((i for i, length in enumerate(lengths) if length != lengths[0]), None)
        if odd is not None:
            self.document.fail(
                (*sources[odd].place, "layer_range"),
                f"takes {_layers(lengths[odd])}, and the first source of the slice {_layers(lengths[0])}",
                hint="layer_range: [first, stop] ends before its second number",
            )
        return piece

    def _source(self, place: Place, value: Any, method: Method, known: Sequence[str]) -> Source:
        if isinstance(value, str):
            self.document.fail(place, f"expected a mapping, found {described(value)}", hint=f"write model: {value}")
        fields = self._fields(place, value, known)
        for needed in ("model", "layer_range"):
            if needed in known and fields.get(needed) is None:
                hint = "models: merges all layers, slices: those of layer_range" if needed == "layer_range" else None
                self.document.fail(place, f"lacks {needed}", hint=hint)
        model = self._model((*place, "model"), fields["model"])
        layers = self._range((*place, "layer_range"), fields["layer_range"]) if "layer_range" in known else None
        return Source(model, place, layers, self._settings(place, fields, method, of_source=True, unused=self.unused))

    def _range(self, place: Place, value: Any) -> tuple[int, int]:
        numbers = value if isinstance(value, list | tuple) else ()
        if len(numbers) != 2 or any(type(number) is not int or number < 0 for number in numbers):
            self.document.fail(place, f"expected two numbers of layers, [first, stop], found {described(value)}")
        first, stop = numbers
        if first > stop:
            self.document.fail(place, f"goes backwards, from {first} to {stop}")
        return first, stop

    def _check(self, piece: Slice, method: Method) -> None:
        """Refuse a slice whose sources are not such as the method merges."""
        models = [source.model for source in piece.sources]
        twice = next((source for i, source in enumerate(piece.sources) if source.model in models[:i]), None)
        if twice is not None:
            self.document.fail(
                (*twice.place, "model"),
                f"{escape(str(twice.model))} is in this slice already",
                hint="give it one entry, with the sum of the weights",
            )
        if method.base == "needed" and piece.base is None:
            self.document.fail(("merge_method",), f"{method.name} needs a base_model, and there is none")
        if piece.base is not None and piece.base not in models:
            self.document.fail(
                piece.place,
                f"base_model {escape(str(piece.base))} is not among the sources",
                hint="in slices it has to be one of them, with a layer_range",
            )
        least, most = method.others
        count = len(models) - (piece.base is not None)
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            besides = " besides base_model" if piece.base is not None else ""
            noun = "model" if wanted == "1" else "models"
            self.document.fail(piece.place, f"{method.name} merges {wanted} {noun}{besides}, found {count}")


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
