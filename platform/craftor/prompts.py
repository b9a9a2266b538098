"""Prompt files -> numbered, tokenised rows in Parquet: read, filter, tokenise, deduplicate, number, all streamed.

The rows are written once into the run's folder, so a resumed run sees the same samples even if the source changed.
"""

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet
import ray.data
from jaxtyping import Bool, Int, UInt64
from transformers import CLIPTokenizer

from craftor.locate import locate
from craftor.recipe import Data


def _read_parquet(path: str, **how: Any) -> ray.data.Dataset:
    """Arrow's own read-ahead would keep all of a file that it has read until the file's end, 100 bytes a prompt.

    Ray's newer reader asks for it whatever it is told, the older one heeds what it is given.
    """
    context = ray.data.DataContext.get_current()
    usual, context.use_datasource_v2 = context.use_datasource_v2, False
    by_pieces = pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=False, use_buffered_stream=True, buffer_size=4 << 20
    )
    try:
        return ray.data.read_parquet(path, fragment_scan_options=by_pieces, **how)
    finally:
        context.use_datasource_v2 = usual


FORMATS: dict[str, Callable[..., ray.data.Dataset]] = {
    ".parquet": _read_parquet,
    ".csv": ray.data.read_csv,
    ".tsv": lambda path, **kw: ray.data.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter="\t"), **kw),
    ".jsonl": ray.data.read_json,
    ".txt": ray.data.read_text,
}

TRUNCATED = "truncated"
BLOCK_BYTES = 2 << 20
"""What a stage hands on at once: every stage has several such blocks in memory, whatever the number of prompts."""
WAITING_BYTES = 128 << 20
"""Of all blocks together: reading is faster than tokenising, and would go on until the object store is full."""
RELEASE_SECONDS = 5.0
"""Between two blocks that are read beyond that all the same, lest all wait for each other; Ray would read on."""
FILE_ROWS = 50_000
"""Of a file that is written, at least: blocks are smaller, and each would be a file."""


@dataclass(frozen=True)
class Prepared:
    """Rows ready for training, and what identifies them."""

    folder: Path | str
    """Or the URL of a prefix cache."""
    num_rows: int
    digest: str
    """sha256 over the prompts in order."""
    num_truncated: int = 0
    """Prompts longer than the text encoder reads: what is beyond its last token is not seen."""


def prepare(data: Data, tokenizers: Mapping[str, str], out: Path) -> Prepared:
    """Write `index, prompt` and token ids to `out`; `tokenizers` maps columns of ids to tokenizer folders.

    Raises ValueError if no prompt is left.
    """
    source = locate(data.path)
    filesystem, path = fsspec.core.url_to_fs(source)
    local = filesystem.protocol in ("file", ("file", "local"))
    # Where the driver is, as a local file is.
    where = {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
    context = ray.data.DataContext.get_current()
    usual, context.target_max_block_size = context.target_max_block_size, BLOCK_BYTES
    try:
        # Cut up for parallel work, a file would start a process for each part, which takes longer than most files.
        how = {"override_num_blocks": 1} | ({} if local else {"filesystem": filesystem})
        rows = FORMATS[suffix(source)](path, **where, **how)
    finally:
        context.target_max_block_size = usual
    column = "text" if suffix(source) == ".txt" else data.column
    known = {name: CLIPTokenizer.from_pretrained(folder) for name, folder in tokenizers.items()}
    # By whole blocks, which Ray then reads in the same process: it would not for a number of rows.
    rows = rows.map_batches(_filter_and_tokenize, fn_args=(data, column, known), batch_size=None, **where)
    rows.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=WAITING_BYTES
    )
    rows.context.output_backpressure_guard_release_interval_s = RELEASE_SECONDS
    shutil.rmtree(out, ignore_errors=True)
    _write(_numbered(rows.iter_batches(batch_size=None, batch_format="pyarrow"), data), out)
    prepared = describe(out)
    if prepared.num_rows == 0:
        raise ValueError(f"data.path = {data.path}: no prompt left after filtering by length and duplicates")
    return prepared


def describe(folder: Path) -> Prepared:
    """Count and digest of rows prepared earlier, read in order."""
    digest, num_rows, num_truncated = hashlib.sha256(), 0, 0
    for path in sorted(folder.glob("*.parquet")):
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("prompt", TRUNCATED) if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            for prompt in batch.column("prompt").to_pylist():
                digest.update(prompt.encode() + b"\n")
            num_rows += len(batch)
            num_truncated += sum(batch.column(TRUNCATED).to_pylist()) if TRUNCATED in columns else 0
    return Prepared(folder, num_rows, digest.hexdigest(), num_truncated)


def suffix(path: str) -> str:
    """The file format's suffix. Raises ValueError listing those that can be read."""
    found = PurePosixPath(path.split("?")[0]).suffix.lower()
    if found not in FORMATS:
        raise ValueError(f"data.path = {path}: unknown format {found or '(no suffix)'}; allowed: {', '.join(FORMATS)}")
    return found


class Seen:
    """Which keys came before, at 8 bytes a key: sorted runs, each at least twice as long as the next.

    A set of Python's bytes takes some 80, most of a gigabyte for ten million prompts.
    """

    def __init__(self) -> None:
        self.runs: list[UInt64[np.ndarray, " n"]] = []

    def new(self, keys: UInt64[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
        """The first of each key that was in no earlier call; all are known from here on."""
        fresh = np.zeros(len(keys), dtype=bool)
        fresh[np.unique(keys, return_index=True)[1]] = True
        for run in self.runs:
            fresh &= run[np.searchsorted(run, keys).clip(max=len(run) - 1)] != keys
        added = np.sort(keys[fresh])
        while self.runs and len(self.runs[-1]) < 2 * len(added):
            # A stable sort merges what is sorted already.
            added = np.sort(np.concatenate([self.runs.pop(), added]), kind="stable")
        if len(added):
            self.runs.append(added)
        return fresh


def _filter_and_tokenize(
    batch: dict[str, np.ndarray], data: Data, column: str, tokenizers: Mapping[str, CLIPTokenizer]
) -> dict[str, np.ndarray]:
    """Strip, filter by length, add a column of ids for each tokenizer and whether any had to cut."""
    stripped = (value.strip() if isinstance(value, str) else "" for value in batch[column])
    prompts = [prompt for prompt in stripped if data.min_chars <= len(prompt) <= data.max_chars]
    truncated, ids = np.zeros(len(prompts), dtype=bool), {}
    for name, tokenizer in tokenizers.items():
        ids[name], too_long = _ids(tokenizer, prompts)
        truncated[too_long] = True
    return {"prompt": np.array(prompts, dtype=object), **ids, TRUNCATED: truncated}


def _ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> tuple[Int[np.ndarray, "b n"], list[int]]:
    """Padded or cut to the tokenizer's length, and which were cut."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompts, padding="max_length", max_length=length, verbose=False).input_ids if prompts else []
    too_long = [i for i, row in enumerate(ids) if len(row) > length]
    for i in too_long:  # cut as CLIP's tokenizer cuts, which would say nothing of it: the mark of the end stays
        ids[i] = [*ids[i][: length - 1], ids[i][-1]]
    return np.array(ids, dtype=np.int32).reshape(len(prompts), length), too_long


def _numbered(batches: Iterable[pyarrow.Table], data: Data) -> Iterator[pyarrow.Table]:
    """Drop repeats and number what is kept, in order and so in one place; end where there are rows enough."""
    seen, count = Seen(), 0
    for rows in batches:
        if data.deduplicate:
            rows = rows.filter(pyarrow.array(seen.new(_keys(rows["prompt"].to_pylist()))))
        if data.max_rows is not None:
            rows = rows.slice(0, data.max_rows - count)
        if len(rows):
            yield rows.add_column(0, "index", pyarrow.array(np.arange(count, count + len(rows))))
        count += len(rows)
        if count == data.max_rows:
            return


def _write(rows: Iterable[pyarrow.Table], out: Path) -> None:
    """Files of FILE_ROWS and more, whose names are in order."""
    out.mkdir(parents=True)
    tables, number = iter(rows), itertools.count()
    for first in tables:
        with pyarrow.parquet.ParquetWriter(out / f"{next(number):06d}.parquet", first.schema) as file:
            file.write_table(first)
            written = len(first)
            while written < FILE_ROWS and (more := next(tables, None)) is not None:
                file.write_table(more)
                written += len(more)


def _keys(prompts: list[str]) -> UInt64[np.ndarray, " b"]:
    """64 bits of hash each: among ten million prompts two that differ share them with a chance of 3 in a million."""
    digests = (hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)
