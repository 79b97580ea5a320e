"""The model that an adapter is for, as far as a GGUF file of the adapter leaves it unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.architecture import Architecture, NotKnown, find_without_files
from weightops.layouts.gguf.families import BY_TYPE, Family
from weightops.layouts.gguf.parameters import Settings, settings_of
from weightops.layouts.gguf.write import language_config


@dataclass(frozen=True)
class Base:
    """`config` is the content of its config.json; `where` its name, safe for a terminal."""

    config: Mapping[str, Any]
    where: str

    @cached_property
    def language(self) -> Mapping[str, Any]:
        """The config of its language model, and nothing of how its weights are quantised."""
        return {key: value for key, value in language_config(self.config).items() if key != "quantization_config"}

    @property
    def sees(self) -> bool:
        """Whether the language model is a part of it, beside one that sees."""
        return self.language.get("model_type") != self.config.get("model_type")

    @cached_property
    def family(self) -> Family:
        """Raises `UsageError` for families that are not known here."""
        kind = self.language.get("model_type")
        family = BY_TYPE.get(str(kind))
        if family is None:
            raise UsageError(
                f"{self.where}/config.json: adapters for model_type {escape(str(kind))[:80]} are not converted to GGUF "
                "or from it",
                hint=f"these are: {', '.join(BY_TYPE)}",
            )
        return family

    @cached_property
    def settings(self) -> Settings:
        """All fields of its config; raises as `settings_of` does, and `CorruptInput` for models of absurd sizes."""
        _ = self.architecture
        return settings_of(self.language, self.family, self.where)

    @cached_property
    def architecture(self) -> Architecture:
        """Its tensors; raises `CorruptInput` where transformers makes none of the config."""
        _ = self.family
        return self._found(self.language)

    @cached_property
    def modules(self) -> dict[str, str]:
        """The modules of peft's model, by what files of the language model call them; others by their own names."""
        if self.sees:
            names = {name.replace("language_model.", ""): name for name in self._found(self.config).loaded}
        else:
            names = {name: name for name in self.architecture.stored}
        end = ".weight"
        return {own.removesuffix(end): name.removesuffix(end) for own, name in names.items() if name.endswith(end)}

    def _found(self, config: Mapping[str, Any]) -> Architecture:
        try:
            return find_without_files({key: value for key, value in config.items() if key != "auto_map"})
        except NotKnown as error:
            raise CorruptInput(f"{self.where}: {error}") from None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, by its name in files or in transformers' model; None if neither is known."""
        return self.architecture.stored.get(name) or self.architecture.loaded.get(name)
