"""Every format is read; what is kept, in which order and under which number does not depend on how it was stored."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from craftor import prompts
from craftor.prompts import Seen, describe, prepare, suffix
from craftor.recipe import Data
from craftor.stream import read

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

LONG = "a ring" + " above a ring" * 12
PROMPTS = ["a red star", "  a blue ring ", "", "a red star", "x", 'a large, red "cross"', "ein grüner Kreis", LONG]
KEPT = ["a red star", "a blue ring", 'a large, red "cross"', "ein grüner Kreis", LONG]


def write(path: Path) -> Path:
    table = pa.table({"prompt": PROMPTS, "seed": list(range(len(PROMPTS)))})
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path)
        case ".csv":
            pyarrow.csv.write_csv(table, path)
        case ".tsv":
            pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter="\t"))
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()) + "\n")
        case _:
            path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_formats_give_the_same_rows(tiny: Path, tmp_path: Path, kind: str) -> None:
    data = Data(path=str(write(tmp_path / f"prompts.{kind}")), min_chars=2)
    prepared = prepare(data, {"input_ids": str(tiny / "pipeline" / "tokenizer")}, tmp_path / "rows")
    rows = pq.read_table(sorted(prepared.folder.glob("*.parquet"))).to_pydict()
    assert rows["prompt"] == KEPT
    assert rows["index"] == list(range(len(KEPT)))
    assert all(len(ids) == 24 for ids in rows["input_ids"])
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "pipeline" / "tokenizer")
    expected = tokenizer(KEPT, padding="max_length", truncation=True).input_ids
    assert [list(ids) for ids in rows["input_ids"]] == expected
    assert prepared.num_truncated == 1, "the long one, cut to what the encoder reads"
    assert prepared == describe(tmp_path / "rows")
    assert read(prepared.folder).materialize().num_blocks() == 1, "each would keep a process busy"


@given(st.lists(st.lists(st.integers(0, 60), max_size=40), max_size=12))
def test_what_was_seen_is_known_as_a_set_would(batches: list[list[int]]) -> None:
    seen, known = Seen(), set[int]()
    for batch in batches:
        expected = []
        for key in batch:
            expected.append(key not in known)
            known.add(key)
        assert seen.new(np.array(batch, dtype=np.uint64)).tolist() == expected
    lengths = [len(run) for run in seen.runs]
    assert sum(lengths) == len(known) and all(a >= 2 * b for a, b in itertools.pairwise(lengths))


def test_a_url_is_read_and_rows_can_be_limited(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "prompts.csv")
    data = Data(path=f"file://{tmp_path}/prompts.csv", max_rows=2, deduplicate=False)
    prepared = prepare(data, {"input_ids": str(tiny / "pipeline" / "tokenizer")}, tmp_path / "rows")
    assert prepared.num_rows == 2


@pytest.mark.parametrize(("max_rows", "num_kept"), [(None, 90), (60, 60)])
def test_blocks_are_numbered_as_one_and_fill_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_rows: int | None, num_kept: int
) -> None:
    """Repeats are known across blocks, numbers go on, and rows are counted over all."""
    monkeypatch.setattr(prompts, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(prompts, "FILE_ROWS", 12)
    texts = [f"a red star above {number % 90} rings" for number in range(400)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    data = Data(path=str(tmp_path / "prompts.txt"), max_rows=max_rows)
    prepared = prepare(data, {"input_ids": str(tiny / "pipeline" / "tokenizer")}, tmp_path / "rows")
    files = [pq.read_table(path) for path in sorted(prepared.folder.glob("*.parquet"))]
    assert len(files) > 1 and all(len(file) >= 12 for file in files[:-1])
    assert [row for file in files for row in file["prompt"].to_pylist()] == texts[:num_kept]
    assert [row for file in files for row in file["index"].to_pylist()] == list(range(num_kept))


def test_nothing_left_is_an_error(tiny: Path, tmp_path: Path) -> None:
    data = Data(path=str(write(tmp_path / "prompts.txt")), min_chars=500)
    with pytest.raises(ValueError, match="no prompt left after filtering"):
        prepare(data, {"input_ids": str(tiny / "pipeline" / "tokenizer")}, tmp_path / "rows")


def test_unknown_formats_are_listed() -> None:
    with pytest.raises(ValueError, match=r"unknown format \.pdf; allowed: \.parquet, \.csv"):
        suffix("a.pdf")
