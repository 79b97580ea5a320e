"""weightops merge"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.colour import say, styled
from weightops.cli.options import refuse_unused, write, write_options
from weightops.cli.output import print_json, running, save_report, table
from weightops.cli.params import FILE, OUT, SEED, SOURCE, WRITE_CODES, Command, NameOf, NumberType, epilog, named
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.strict_json import as_json

if TYPE_CHECKING:
    from weightops.operations.merge import MergePlan, MergeProof

_EACH = "Once for all models, or once for each."
_NUMBER, _CHOICE = "NUMBER[,...]", "true|false"
PARAMETERS: Mapping[str, tuple[str, str]] = {
    "weight": (_NUMBER, f"How much a model counts. {_EACH}"),
    "t": (_NUMBER, "How far from the base (0) to the other model (1), for slerp; how close is close, for nearswap."),
    "density": (_NUMBER, f"The share of a model's changes that is kept: ties, dare, della, breadcrumbs. {_EACH}"),
    "lambda": (_NUMBER, "What the sum of all changes is multiplied by."),
    "normalize": (_CHOICE, "Divide by the sum of the weights; the default depends on the method."),
    "rescale": (_CHOICE, "Make up for the changes that were dropped."),
    "gamma": (_NUMBER, f"The share of the largest changes that is dropped: breadcrumbs. {_EACH}"),
    "epsilon": (_NUMBER, "How far chances go from the density, for della; the least change that counts, for ram."),
    "select_topk": (_NUMBER, "The share of elements that is merged, those that vary most: sce."),
    "filter_wise": (_CHOICE, "Go by the rows of each tensor: model_stock."),
    "nuslerp_flatten": (_CHOICE, "Go by whole tensors: nuslerp."),
    "nuslerp_row_wise": (_CHOICE, "Go by columns, where it does not go by whole tensors: nuslerp."),
    "normalize_weights": (_CHOICE, "Divide weights by their sum: multislerp."),
    "eps": (_NUMBER, "The length below which a direction counts for nothing: multislerp."),
    "max_iter": (_NUMBER, "Steps at most: karcher."),
    "tol": (_NUMBER, "The length of a step that is the last: karcher."),
    "r": (_NUMBER, "How much is added to what one model alone changed: ramplus_tl."),
    "alpha": (_NUMBER, "How much of that at most: ramplus_tl."),
    "scale": (_NUMBER, "What the model is multiplied by: passthrough."),
}
"""The parameters of all methods as mergekit calls them: what stands for a value, and what it means."""


class _Parameter(click.Option):
    section = "Parameters of methods (a number, or several along the layers: 0,0.5,1)"


def _parameters(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, (metavar, line) in reversed(list(PARAMETERS.items())):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, name, cls=_Parameter, multiple=True, metavar=metavar, help=line)(command)
    return command


@click.command("merge", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("models", nargs=-1, required=True, type=SOURCE, metavar="MODEL...")
@click.option("-o", "--out", type=OUT, help="Folder to write. It appears when it is complete.")
@click.option(
    "--method",
    type=NameOf(named("ops.merging.methods", "METHODS")),
    metavar="NAME",
    help="How to merge the models that are named: linear, slerp, nuslerp, multislerp, karcher, task_arithmetic, ties, "
    "dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties, sce, model_stock, nearswap, "
    "arcee_fusion, ram, ramplus_tl or passthrough.",
)
@click.option("--base", type=SOURCE, help="The model that the others were tuned from; for slerp one of the two.")
@_parameters
@click.option(
    "--dtype", type=NumberType(["float32", "float16", "bfloat16"]), help="Convert to this number type before merging."
)
@click.option("--out-dtype", type=NumberType(["float32", "float16", "bfloat16"]), help="Write this number type.")
@click.option(
    "--tokenizer-source",
    metavar="union|base|MODEL",
    help="Whose tokens the result has, where models have others; default: those of the base or first model.",
)
@click.option("--chat-template", metavar="TEXT", help="The template: auto, a name such as chatml, or a text in Jinja.")
@click.option("--seed", type=int, default=0, show_default=True, help=SEED)
@click.option(
    "--allow-nonfinite", is_flag=True, help="Merge NaN and infinities as they are; they are refused otherwise."
)
@click.option("--plugin", type=FILE, help="A Python file with further methods. It is run: use only what you have read.")
@click.option("--html", type=FILE, help="Write a page for a browser: how far the result is from each model, and where.")
@click.option("--explain", is_flag=True, help="Show what would be done for each tensor, and write nothing.")
@click.option(
    "--verify", type=SOURCE, metavar="FOLDER", help="Say whether this folder is what the merge makes; write nothing."
)
@write_options
def command(models: tuple[Path | str, ...], out: Path | None, **options: Any) -> None:
    """Merge models into one, by mergekit's methods.

    Name the models, and a --method; or name a merge file in their place, which says all that in mergekit's language.
    Thousands of published models have theirs beside them, as mergekit_config.yml. Of each model no more than a few
    blocks are in memory. If it is interrupted, the same command continues.

    \b
    Example:
      weightops merge ./a ./b --method slerp --base ./a --t 0.5 --out ./merged
      weightops merge ./chat ./code --base ./base --method ties \\
          --density 0.5 --weight 0.6 --weight 0.4 --out ./merged
      weightops merge ./merge.yml --out ./merged
      weightops merge ./merge.yml --explain
      weightops merge ./merge.yml --verify ./merged

    A model is a folder, hf://org/name[@revision], or either with an adapter: ./model+./lora. GPTQ models are merged as
    the numbers that they stand for. Random masks (dare, della) depend on --seed, the tensor's name and the model's
    place in the list alone, so that every machine draws the same ones. Shapes, tokenizers and settings are
    compared before any weights are read.
    """
    explained, verified, html = options.pop("explain"), options.pop("verify"), options.pop("html")
    given = {name: options.pop(name) for name in PARAMETERS}
    merging = {name: options.pop(name) for name in _MERGING}
    target = _models(models, given, merging)
    if (out is not None) + explained + (verified is not None) != 1:
        raise UsageError("expected one of --out, --explain and --verify", hint="--out DIR writes the result there")
    if out is not None:
        _write(target, merging, out, html, options)
    elif verified is not None:
        _verify(target, merging, verified, options)
    else:
        _explain(target, merging, options)


_MERGING = (
    *("method", "base", "dtype", "out_dtype", "tokenizer_source", "chat_template"),
    *("seed", "allow_nonfinite", "plugin"),
)


def _models(
    models: Sequence[Path | str], given: Mapping[str, Sequence[str]], merging: dict[str, Any]
) -> Path | str | list[Any]:
    """The merge file, or the models with what was said of each; what was said for all goes into `merging`."""
    said = {name: values for name, values in given.items() if values}
    is_file = len(models) == 1 and str(models[0]).endswith((".yml", ".yaml"))
    if is_file:
        if said:
            raise UsageError(
                f"--{min(said).replace('_', '-')} has no use with a merge file, which says all",
                hint="write it into the file, or name the models instead",
            )
        return models[0]
    merging["parameters"] = {name: _value(name, values[0]) for name, values in said.items() if len(values) == 1}
    several = {name: values for name, values in said.items() if len(values) > 1}
    for name, values in several.items():
        if len(values) != len(models):
            raise UsageError(
                f"--{name.replace('_', '-')} is given {len(values)} times for {len(models)} models",
                hint="give it once for all, or once for each",
            )
    if not several:
        return list(models)
    return [
        {"model": str(model), "parameters": {name: _value(name, values[i]) for name, values in several.items()}}
        for i, model in enumerate(models)
    ]


def _value(name: str, text: str) -> Any:
    """A number, true or false; several of them, between commas, are a list."""
    words = {"true": True, "false": False}
    try:
        found = [words[part.strip()] if part.strip() in words else float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--{name.replace('_', '-')}: cannot read {escape(text)}", hint="a number, or several as in 0,0.5,1"
        ) from None
    return found if len(found) > 1 else found[0]


def _write(target: Any, merging: Mapping[str, Any], out: Path, html: Path | None, options: dict[str, Any]) -> None:
    """Write the merged model, and if it is wanted the page that compares it with what it was made of."""
    from weightops.io.atomic import check_target

    if html is not None:
        refuse_unused("with --html, which compares a result that is there", "job", "executor")
        check_target(html)
    workers, quiet, is_dry = options["workers"], options["quiet"], options["dry_run"]
    write(partial(weightops.merge, target), out, **merging, **options)
    if html is not None and not is_dry:
        from weightops.cli.pages.compare import page

        with running(quiet) as control:
            found = weightops.compare_merge(target, out, workers=workers, control=control, **merging)
        click.get_current_context().exit(save_report(html, page(found)))


def _explain(target: Any, merging: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    refuse_unused("with --explain, which writes nothing", "html", *_WRITING)
    with running(options["quiet"]) as control:
        plan = weightops.explain_merge(target, control=control, **merging)
    if options["as_json"]:
        print_json(as_json(plan))
    else:
        say(_plan_text(plan))


def _verify(target: Any, merging: Mapping[str, Any], folder: Path | str, options: Mapping[str, Any]) -> None:
    refuse_unused("with --verify, which writes nothing", "html", *_WRITING)
    with running(options["quiet"]) as control:
        proof = weightops.verify_merge(target, folder, workers=options["workers"], control=control, **merging)
    if options["as_json"]:
        print_json(as_json(proof))
    elif not options["quiet"] or not proof.is_same:
        say(_proof_text(proof))
    click.get_current_context().exit(0 if proof.is_same else 3)


_WRITING = (
    *("format", "max_shard_size", "expect", "digest", "card", "reflink"),
    *("overwrite", "restart", "dry_run", "job", "executor"),
)


def _plan_text(plan: MergePlan) -> str:
    lines = [("tensor", "method", "made of", "parameters")]
    for made in plan.tensors:
        inputs = []
        for each in made.inputs:
            tensor = "" if each.tensor == made.tensor else f": {escape(each.tensor)}"
            said = _named(each.parameters)
            role = " (base)" if each.is_base else f" [{said}]" if said else ""
            inputs.append(f"{escape(each.model)}{tensor}{role}")
        lines.append((escape(made.tensor), made.method, ", ".join(inputs), _named(made.parameters)))
    return table(lines)


def _named(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in parameters.items() if value is not None)


def _plain(value: Any) -> str:
    """A parameter's value as merge files have it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _proof_text(proof: MergeProof) -> str:
    lines = [f"tensor {escape(name)} differs" for name in proof.differ]
    lines += [f"tensor {escape(name)} is missing" for name in proof.missing]
    lines += [f"tensor {escape(name)} is not of this merge" for name in proof.extra]
    lines += [f"{escape(name)} differs" for name in proof.files]
    verdict = styled("is", "good") if proof.is_same else styled("is NOT", "bad")
    return "\n".join([*lines, f"{escape(proof.folder)}: {verdict} what this merge makes ({proof.n_tensors} tensors)"])
