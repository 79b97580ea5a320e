"""The JSON Schemas of all that weightops prints with `--json` and writes as JSON, from the types that define it.

`python docs/generate.py` writes them to docs/schemas/, one for each schema id; a test holds them to the types.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec

from weightops.api.comparison_report import CompareDocument
from weightops.api.quantize_report import QuantizeDocument
from weightops.cli.commands.finish import FinishDocument
from weightops.cli.commands.work import WorkDocument
from weightops.cli.events import Event
from weightops.cli.machine import EnvDocument
from weightops.cli.output import ErrorDocument
from weightops.engine.ending import Ending
from weightops.engine.job.documents import Finished, Group, GroupRecord, Job
from weightops.engine.publishing import PartialRun
from weightops.formats.delta import Delta
from weightops.formats.job_owner import JobOwner
from weightops.formats.proofs.manifest import Manifest
from weightops.inference.batch import AnswerDocument, AnswersDocument, BatchDocument
from weightops.inference.chat import ChatDocument
from weightops.inference.events import Event as TextEvent
from weightops.inference.figures import EvalDocument
from weightops.inference.generate import GenerateDocument
from weightops.operations.check import CheckDocument
from weightops.operations.download import DownloadDocument
from weightops.operations.experts import ExpertUse
from weightops.operations.inspect import InspectDocument
from weightops.operations.merge import MergePlan, MergeProof
from weightops.operations.publish import PublishDocument
from weightops.operations.sign import SignDocument
from weightops.operations.verify import VerifyDocument
from weightops.quantization.report import QuantizeReport
from weightops.quantization.work import BlocksRun
from weightops.recipes.report import RunDocument, WriteDocument

FOLDER = Path(__file__).with_name("schemas")
DOCUMENTS: tuple[Any, ...] = (
    WriteDocument,
    RunDocument,
    WorkDocument,
    FinishDocument,
    QuantizeDocument,
    DownloadDocument,
    CheckDocument,
    VerifyDocument,
    PublishDocument,
    SignDocument,
    InspectDocument,
    CompareDocument,
    MergePlan,
    MergeProof,
    EvalDocument,
    ExpertUse,
    GenerateDocument,
    TextEvent,
    ChatDocument,
    AnswersDocument,
    AnswerDocument,
    BatchDocument,
    EnvDocument,
    ErrorDocument,
    Event,
    Manifest,
    Delta,
    QuantizeReport,
    PartialRun,
    BlocksRun,
    Job,
    Group,
    Ending,
    GroupRecord,
    Finished,
    JobOwner,
)


def schemas() -> dict[str, dict[str, Any]]:
    """JSON Schemas (2020-12) by the schema ids of the documents that they describe."""
    found = {}
    for document in DOCUMENTS:
        schema = _in_lines(msgspec.json.schema(document))
        name = _id_of(schema)
        found[name] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": name, **schema}
    return found


def _in_lines(schema: Any) -> Any:
    """The same with descriptions that are paragraphs, as sources are not."""
    if isinstance(schema, list):
        return [_in_lines(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(each).split("\n\n"))
        if key == "description" and isinstance(each, str)
        else _in_lines(each)
        for key, each in schema.items()
    }


def _id_of(schema: dict[str, Any]) -> str:
    """The one value that a document's `schema` may have."""
    references = [each["$ref"] for each in schema.get("anyOf", [schema])]
    shapes = [schema["$defs"][reference.rpartition("/")[2]] for reference in references]
    (name,) = {name for shape in shapes for name in shape["properties"]["schema"]["enum"]}
    return str(name)


def render() -> dict[Path, str]:
    """The files of docs/schemas/."""
    return {FOLDER / file_name(name): json.dumps(schema, indent=2) + "\n" for name, schema in schemas().items()}


def file_name(name: str) -> str:
    """The file that describes documents of a schema id."""
    return f"{name.replace('/', '-')}.json"
