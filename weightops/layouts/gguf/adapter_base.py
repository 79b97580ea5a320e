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
        try:
            return find_without_files({key: value for key, value in self.language.items() if key != "auto_map"})
        except NotKnown as error:
            raise CorruptInput(f"{self.where}: {error}") from None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, by its name in files or in transformers' model; None if neither is known."""
        return self.architecture.stored.get(name) or self.architecture.loaded.get(name)
