"""What a quantise run has done so far, in a folder beside its output.

    OUT.blocks/weightops.lock           held by the run that writes
    OUT.blocks/run.json                 what the run is: source, settings, calibration
    OUT.blocks/block-00007.safetensors  the packed tensors of block 7; in its header the report on its modules
    OUT.blocks/hidden-00008.bin         what enters block 8, float32 [samples, tokens, hidden]

A block is done when its file has its name; what enters the next one is on disk before that. So a run that was killed
continues at its block, from the very numbers that it would have had. The hidden states are always read from and
written to these files: the page cache keeps them in memory as long as there is room, and no longer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from weightops.engine.preflight import free_disk
from weightops.engine.work_folder import WorkFolder
from weightops.errors import CorruptInput, NoRoom, PlanDiffers
from weightops.formats.safetensors import read_safetensors
from weightops.io.atomic import fsync_folder, write_whole
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.platform.files import flush, open_to_write, read_at, write_at
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.plan import first_difference
from weightops.quantization.options import Options
from weightops.stores.reader import FileReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA = "weightops-blocks/1"
_REPORT = "report"


class BlocksRun(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag=SCHEMA):
    """`run.json`: source, settings, data and versions, all of which a run must have in common to be continued.

    `source` and `calibration` are digests, `contents` is one of a sample of every tensor, `files` what it makes here.
    There are no `options` where nothing is quantised, but inputs of layers measured.
    """

    source: str
    contents: str = msgspec.field(name="source contents")
    options: Options | None
    calibration: str | None
    versions: dict[str, str]
    files: tuple[str, ...] = ()


def blocks_of(out: Path) -> Path:
    """Where the run that makes `out` works."""
    return out.with_name(f"{out.name}.blocks")


class Work:
    """The folder of one run; a context manager that holds its lock."""

    def __init__(self, out: Path, identity: BlocksRun, n_blocks: int, *, restart: bool = False) -> None:
        """Take the lock, and find what an earlier run of the same identity has done.

        Raises `Locked`, `OutputExists` for a folder that is not ours, or `PlanDiffers` naming the field in which the
        runs differ.
        """
        self.work_folder = WorkFolder(blocks_of(out), SCHEMA)
        self.folder = self.work_folder.path
        self._n_blocks = n_blocks
        try:
            self._resume(identity, restart)
        except BaseException:
            self.close()
            raise

    def _resume(self, identity: BlocksRun, restart: bool) -> None:
        numbers = range(self._n_blocks + 1)
        files = tuple(path.name for i in numbers for path in (self._block(i), self._hidden(i)))
        identity = msgspec.structs.replace(identity, files=files)
        if self.work_folder.document is not None and not restart:
            difference = first_difference(json.loads(msgspec.json.encode(identity)), self.work_folder.document)
            if difference is not None:
                raise PlanDiffers(
                    f"{escape(str(self.folder))} is of another run: {difference}",
                    hint="run the earlier command again to finish it, or give --restart to throw it away",
                )
            self.work_folder.own_files()
            return
        self.work_folder.clear()
        self.work_folder.begin(identity)

    def _block(self, i: int) -> Path:
        return self.folder / f"block-{i:05d}.safetensors"

    def _hidden(self, i: int) -> Path:
        return self.folder / f"hidden-{i:05d}.bin"

    @property
    def n_done(self) -> int:
        """Blocks that are done."""
        n = 0
        while self._block(n).exists():
            n += 1
        return n

    def hidden(self, i: int, shape: tuple[int, int, int]) -> Hidden:
        """What enters block `i`, to be read, or written anew."""
        return Hidden(self._hidden(i), shape)

    def commit(self, i: int, tensors: Mapping[str, NDArray[Any]], report: Any) -> None:
        """Block `i` is done; what entered it is not needed again."""
        from safetensors.numpy import save

        write_whole(self._block(i), save(dict(tensors), metadata={_REPORT: json.dumps(report)}))
        for path in self.folder.glob("hidden-*.bin"):
            if path != self._hidden(i + 1):
                path.unlink()

    def read(self, i: int) -> tuple[dict[str, LazyTensor], Any]:
        """The tensors of block `i`, and the report on it."""
        with FileReader() as files:
            found = read_safetensors(SourceFile.at(self._block(i)), files)
        try:
            return dict(found.tensors), json.loads(found.metadata[_REPORT])
        except (KeyError, ValueError):
            raise CorruptInput(
                f"{escape(str(self._block(i)))}: has no report on its block", hint="give --restart to begin anew"
            ) from None

    def close(self) -> None:
        self.work_folder.close()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Hidden:
    """Hidden states of all samples in a file, float32 `[samples, tokens, hidden]`; a context manager."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path, self.shape = path, shape
        self._fd = open_to_write(path, read=True)

    @property
    def sample_nbytes(self) -> int:
        return self.shape[1] * self.shape[2] * 4

    def read(self, first: int, stop: int) -> torch.Tensor:
        """The states of some samples."""
        batch = torch.empty((stop - first, *self.shape[1:]), dtype=torch.float32)
        view, offset = _bytes(batch), first * self.sample_nbytes
        while view:
            n = read_at(self._fd, view, offset)
            if n == 0:
                raise CorruptInput(f"{escape(str(self._path))}: ends early", hint="give --restart to begin anew")
            view, offset = view[n:], offset + n
        return batch

    def write(self, first: int, states: torch.Tensor) -> None:
        """The states of the samples from `first` on."""
        data = _bytes(states.detach().to("cpu", torch.float32).contiguous())
        offset = first * self.sample_nbytes
        try:
            while data:
                n = write_at(self._fd, data, offset)
                data, offset = data[n:], offset + n
        except OSError as error:
            raise write_failure(self._path, error) from None

    def flush(self) -> None:
        """All that was written is on disk."""
        flush(self._fd)
        fsync_folder(self._path.parent)

    def __enter__(self) -> Hidden:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]  # numpy's arrays are buffers


def check_room(out: Path, output_nbytes: int, hidden_nbytes: int) -> None:
    """Refuse before work starts what the disk cannot hold: blocks, output, and hidden states twice."""
    needed, free = 2 * output_nbytes + 2 * hidden_nbytes, free_disk(out)
    if needed > free:
        raise NoRoom(
            f"{escape(str(out))}: quantising needs {needed / 1e9:.1f} GB beside it, {free / 1e9:.1f} GB are free",
            hint="fewer --samples or a shorter --seq-len need less",
        )
