"""The program: finds the command, runs it, and turns errors into one sentence, a hint and an exit code."""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from click.shell_completion import CompletionItem

from weightops.errors import WeightopsError
from weightops.recipes.names import field_of, parameter_of
from weightops.version import __version__

if TYPE_CHECKING:
    from weightops.cli.output import ErrorDocument

GROUPS = {
    "Get a model": {
        "download": "Download a model, and check every file against its digest.",
    },
    "Give it to others": {
        "publish": "Publish a verified model on a hub or in a bucket.",
    },
    "Make a model of others": {
        "recover": "Recover a tuned model from the original and a difference.",
        "convert": "Convert between transformers, Meta, TencentPretrain and GGUF.",
        "diff": "Make the difference from which a tuned model is recovered.",
        "merge": "Merge models by mergekit's methods, from its files.",
        "merge-lora": "Merge LoRA adapters into the model they were trained on.",
        "extract-lora": "Make a LoRA adapter of the difference between two models.",
        "adapter": "Combine LoRA adapters, change their ranks, convert them.",
        "cast": "Convert weights to another number type; count what is lost.",
        "quantize": "Quantise a model to 2, 3, 4 or 8 bits with GPTQ.",
        "imatrix": "Measure on a text which weights matter most, for GGUF files.",
        "dequantize": "Turn a quantised model back into a plain one.",
        "pack": "Make a quantised model of integers and scales that you have.",
        "repack": "Put the integers of a quantised model into another container.",
        "edit": "Change tensors and settings by steps that a file lists.",
        "part": "Cut a part out of a model, or put one into it.",
        "experts": "Stack, take apart, drop or make a mixture's experts.",
        "shard": "Rewrite a model in other files, names or layers.",
        "vocab": "Change a model's vocabulary: rows, tokens, tokenizer, ids.",
        "run": "Carry out a recipe: several steps and results in one go.",
        "work": "Do a part of a job that several machines share.",
        "finish": "End a job: prove it, and give its results their names.",
    },
    "Prove that it is right": {
        "verify": "Check that the files of a model are the right ones.",
        "check": "Look for mistakes in a model's values, tensors and settings.",
        "manifest": "Record the digests of a model's files, for later checks.",
        "sign": "Sign the files of a model, with a key or with Sigstore.",
        "compare": "Say what changed between models, where, and by how much.",
    },
    "Look at it": {
        "inspect": "Show what the files of a model or an adapter hold.",
        "browse": "Walk through a model in the terminal, or through two.",
        "env": "Show versions, machine, disk and hub, for bug reports.",
        "completion": "Print the script with which a shell completes commands.",
    },
    "Run it": {
        "eval": "Measure how well a model predicts a text.",
        "chat": "Talk to a model, line by line.",
        "generate": "Continue a text, even if the model does not fit in memory.",
        "serve": "Serve models to a web page and to OpenAI's clients.",
    },
}
"""The commands, as `--help` lists them: a line of at most 80 columns each."""
COMMANDS = {name: line for commands in GROUPS.values() for name, line in commands.items()}
SUBCOMMANDS: Mapping[str, tuple[str, ...]] = {"adapter": ("combine", "rank", "convert")}
"""Commands that have commands of their own, and what these are called."""
LINES: tuple[str, ...] = tuple(
    line for name in COMMANDS for line in ([f"{name} {sub}" for sub in SUBCOMMANDS.get(name, ())] or [name])
)
"""What is typed to run each command: the name, or two words."""
PROGRAM = "weightops"
COMPLETION = "_WEIGHTOPS_COMPLETE"
"""What the scripts of `completion` set in the environment to ask for completions."""
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
    COMPLETION: "set by the script that `weightops completion` prints, to ask for completions",
    "NO_COLOR": "set to anything: no colour",
    "FORCE_COLOR": "set to anything: colour also where there is no terminal",
    "TERM": "dumb: a terminal without colour",
    "HF_ENDPOINT": "the hub; default https://huggingface.co",
    "HF_TOKEN": "the hub's token; default: that of `hf auth login`, which HF_HOME and HF_TOKEN_PATH say the place of",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1: no token",
    "HF_HUB_OFFLINE": "1: no server is asked; hf://org/name is what the cache has of it",
    "HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME": "where the Hugging Face cache is; default ~/.cache/huggingface/hub",
    "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY": "http://user:password@host:port, by the scheme of a URL",
    "NO_PROXY": "hosts and networks (10.0.0.0/8), each with a port or without, that need no proxy; * is all",
    "SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX": "which group `work` does, as Slurm and Kubernetes number their tasks",
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
        command.context_settings = {"token_normalize_func": partial(_option_name, cmd_name)}
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, 1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands by their names alone, for which none is imported; and options."""
        found = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, line in commands.items()])


def _option_name(command: str, token: str) -> str:
    """An option of a command as it is called, however it was written: with underscores, or by an old name."""
    return field_of(parameter_of(token, command)).replace("_", "-")


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
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Download, recover, convert, merge, quantise and check the weights of large language models.

    Models of any size are worked on at the speed of the disk, in a few hundred MB of memory. A result appears only
    when it is complete, and a command that was interrupted continues when it is given again.

    \b
    Example:
      weightops download org/name --out ./name
      weightops cast ./name --dtype bfloat16 --out ./name-bf16
      weightops verify ./name-bf16

    `weightops COMMAND --help` explains a command.
    """


def _told(error: BaseException) -> ErrorDocument:
    """What there is to say of an error, whatever it is."""
    from weightops.cli.output import ErrorDocument, document_of

    name, hint, exit_code = type(error).__name__, None, 1
    match error:
        case WeightopsError():
            return document_of(error)
        case click.ClickException():
            context = error.ctx if isinstance(error, click.UsageError) else None
            hint = f"{context.command_path} --help" if context else None
            name, message, exit_code = "UsageError", error.format_message(), error.exit_code
        case click.Abort() | KeyboardInterrupt():
            name, message, exit_code = "Interrupted", "interrupted", 130
        case OSError():
            from weightops.io.direct import NO_ROOM, write_failure

            if error.errno in NO_ROOM:
                return document_of(write_failure(Path(str(error.filename or "the output")), error))
            where = "".join(f"{name}: " for name in (error.filename,) if name)
            message = f"{where}{(error.strerror or str(error)).lower()}"
            exit_code = 10 if error.errno == errno.ENOENT else 1
        case MemoryError():
            message, hint, exit_code = "out of memory", "give fewer --workers", 16
        case _:
            message = f"unexpected {name}: {error}"
            hint = "this is a bug: set WEIGHTOPS_DEBUG=1 for the traceback and report it"
    return ErrorDocument(error=name, exit_code=exit_code, message=message, hint=hint)


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
    # numpy's BLAS starts a thread for every core when it is loaded, each of which spins a while before it sleeps.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imports make a million objects that stay: looking through them for garbage is a tenth of the time they take.
    gc.set_threshold(100_000)
    sys.exit(run(sys.argv[1:] if args is None else list(args)))


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        if "HF_ENDPOINT" in os.environ and COMPLETION not in os.environ:
            from weightops.cli.network import hub_endpoint

            # huggingface_hub cannot be imported with what is no URL.
            os.environ["HF_ENDPOINT"] = hub_endpoint()
        result = cli.main(args=list(args), prog_name=PROGRAM, complete_var=COMPLETION, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (Exception, KeyboardInterrupt) as error:  # the edge: what nobody foresaw is a sentence too
        is_said = isinstance(error, click.ClickException | click.Abort | KeyboardInterrupt | MemoryError)
        if os.environ.get("WEIGHTOPS_DEBUG") and not is_said:
            raise
        from weightops.cli.output import report_error

        return report_error(_told(error), "--json" in args, bool({"-v", "--verbose"} & set(args)))
