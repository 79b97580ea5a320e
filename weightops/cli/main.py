"""The program: finds the command, runs it, and turns errors into one sentence, a hint and an exit code."""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from weightops.errors import WeightopsError
from weightops.version import __version__

COMMANDS = {
    "download": "Fetch a repository or file, and prove what arrived.",
    "recover": "Recover tuned weights from raw weights and a delta.",
    "convert": "Move a LLaMA model between Hugging Face, Meta, TencentPretrain and GGUF.",
    "diff": "Make a delta between two checkpoints.",
    "merge-lora": "Merge LoRA adapters into a base, to the bit as peft does.",
    "extract-lora": "Make the LoRA adapter that takes one checkpoint to another.",
    "cast": "Convert weights to another dtype, and count what is lost.",
    "quantize": "Quantise a model to 2, 3, 4 or 8 bits with GPTQ, block by block.",
    "dequantize": "Turn a model quantised by GPTQ back into a plain one.",
    "pack": "Make a GPTQ model of integers, scales and zero points.",
    "eval": "Measure perplexity, and how far a model is from another.",
    "generate": "Continue a text, from any checkpoint, in memory or layer by layer.",
    "shard": "Rewrite a checkpoint in other files, under other names, with other layers.",
    "run": "Carry out a recipe: several operations and outputs from one read.",
    "check": "Look for what is wrong with a checkpoint, in its values and its files.",
    "verify": "Check a folder against a manifest or checksum list.",
    "manifest": "Digest a folder, for verify, md5sum, sha256sum or xxhsum.",
    "inspect": "Show what a checkpoint holds, from its headers.",
    "env": "Show versions and machine, for bug reports.",
}
EXIT_CODES = {
    0: "done; checked and equal",
    1: "error; the inputs do not belong together",
    2: "wrong usage",
    3: "checked, and it differs",
    10: "source missing",
    11: "output exists",
    12: "the partial output is of another plan",
    13: "corrupt or hostile input",
    14: "authentication failed",
    15: "locked by another run",
    16: "not enough disk or memory",
    130: "interrupted (143 by SIGTERM); the same command continues",
}
ENVIRONMENT = {
    "WEIGHTOPS_DEBUG": "set to anything: a traceback with every error, and the warnings of libraries",
    "HF_ENDPOINT": "the hub; default https://huggingface.co",
    "HF_TOKEN": "the hub's token; default: that of `hf auth login`, which HF_HOME and HF_TOKEN_PATH say the place of",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1: no token",
    "HF_HUB_CACHE, HF_HOME": "the Hugging Face cache, or the folder that it is in as hub; default ~/.cache/huggingface",
    "HF_HUB_OFFLINE": "1: no server is asked; hf://org/name is what the cache has of it",
    "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY": "http://user:password@host:port, by the scheme of a URL",
    "NO_PROXY": "hosts and networks (10.0.0.0/8), each with a port or without, that need no proxy; * is all",
    "XDG_CACHE_HOME": "where what architectures are like is kept; default ~/.cache",
    "SSL_CERT_FILE": "authorities to trust in the place of the system's",
}
"""What is read of the environment. Options are not: no variable that somebody forgot may weaken a check."""


class _Commands(click.Group):
    """Commands by name, each imported only when it is used: `--help` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"weightops.cli.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, 1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _exit_code_help() -> str:
    return "Exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items()) + "."


@click.command(
    cls=_Commands,
    epilog=_exit_code_help(),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 110,
    },
)
@click.version_option(__version__, prog_name="weightops")
def cli() -> None:
    """Ship, recover and check large-model weights: at the speed of the disk, in a few hundred MB, to the bit.

    \b
      weightops recover --raw ./llama-13b --diff ./zhixi-diff --out ./zhixi
      weightops verify ./zhixi
    """


def _told(error: OSError) -> tuple[str, str | None, int]:
    """What the system refused, where no code of ours expected it: message, hint and exit code."""
    from weightops.io.direct import NO_ROOM, write_failure

    if error.errno in NO_ROOM:
        failure = write_failure(Path(str(error.filename or "the output")), error)
        return str(failure), failure.hint, failure.exit_code
    where = "".join(f"{name}: " for name in (error.filename,) if name)
    return f"{where}{(error.strerror or str(error)).lower()}", None, 10 if error.errno == errno.ENOENT else 1


def _silence_libraries() -> None:
    """Show no warnings of libraries: newer versions of them warn the authors of a program, not those who run it.

    Filters that somebody asked Python for (-W, PYTHONWARNINGS) stay.
    """
    import logging

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    if not os.environ.get("WEIGHTOPS_DEBUG"):
        _silence_libraries()
    # Text of models and names of files have characters that a terminal's encoding may lack.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # OpenMP's threads wait for each other in a loop, which beside other work takes several times as long as computing.
    # To be woken each time takes as long as adding 100,000 numbers; so GNU's look a while (some 50 us), and then sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Imports make a million objects that stay: looking through them for garbage is a tenth of the time they take.
    gc.set_threshold(100_000)
    sys.exit(run(sys.argv[1:] if args is None else list(args)))


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    from weightops.cli.output import report_error

    as_json = "--json" in args
    try:
        if "HF_ENDPOINT" in os.environ:
            from weightops.cli.network import hub_endpoint

            # huggingface_hub cannot be imported with what is no URL.
            os.environ["HF_ENDPOINT"] = hub_endpoint()
        result = cli.main(args=list(args), prog_name="weightops", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"{context.command_path} --help" if context else None
        return report_error(error.format_message(), hint, error.exit_code, as_json)
    except (click.Abort, KeyboardInterrupt):
        return report_error("interrupted", None, 130, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except WeightopsError as error:
        if os.environ.get("WEIGHTOPS_DEBUG"):
            raise
        return report_error(str(error), error.hint, error.exit_code, as_json)
    except OSError as error:
        if os.environ.get("WEIGHTOPS_DEBUG"):
            raise
        return report_error(*_told(error), as_json)
    except MemoryError:
        return report_error("out of memory", "give fewer --workers", 16, as_json)
    except Exception as error:  # the edge: what nobody foresaw is a sentence too, and a traceback on request
        if os.environ.get("WEIGHTOPS_DEBUG"):
            raise
        message = f"unexpected {type(error).__name__}: {error}"
        return report_error(message, "this is a bug: set WEIGHTOPS_DEBUG=1 for the traceback and report it", 1, as_json)
