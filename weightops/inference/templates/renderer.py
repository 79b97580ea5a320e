"""Fills chat templates in; run as a program of its own, because a template is a program of somebody else's.

It reads a JSON object from stdin (`template`, a list of `variables`, `seconds` and `nbytes`) and writes one to stdout:
`texts`, or `error` and at which variables it came (`at`). It takes no more time and memory than it is given. Names,
filters and settings are those of transformers' `apply_chat_template`, without its import, so that it starts in a tenth
of a second.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what a model is to learn, changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict`, without attributes by which a template could get at more."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, that takes no names which Python has a use for."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in jinja
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace has no {name}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def compiled(template: str) -> jinja2.Template:
    """A template, ready to be filled in; raises whatever jinja2 raises."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _main() -> None:
    job = json.load(sys.stdin)
    sys.path.append(sys.argv[1])
    from weightops.io.platform.limits import limit_process

    limit_process(job["seconds"] + 1, job["nbytes"])
    texts: list[str] = []
    found: dict[str, Any]
    try:
        template = compiled(job["template"])
        for variables in job["variables"]:
            texts.append(template.render(**variables))
        found = {"texts": texts}
    except MemoryError:
        del texts[:]
        found = {"error": "it takes too much memory", "at": None}
    except Exception as error:
        found = {"error": str(error) or type(error).__name__, "at": len(texts)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
