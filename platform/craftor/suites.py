"""Prompt suites by name: the files by which text-to-image models are compared -> their prompts, with categories.

No suite's text is shipped. It is read from where it is published, or from a file, folder, URL or hub dataset of the
user's, and its content is checked: scores on another version of a suite are not comparable, whatever it is called.
"""

import csv
import hashlib
import io
import json
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import fsspec
from huggingface_hub import hf_hub_download

_GITHUB = "https://raw.githubusercontent.com"


class SuiteError(ValueError):
    """A suite that cannot be read, is another version, or lacks a category."""


@dataclass(frozen=True)
class Row:
    """One prompt, and its category in each of the suite's columns."""

    prompt: str
    categories: tuple[str, ...] = ()


Reader = Callable[[str, str], Iterable[Row]]
"""(a file's name, its text) -> rows. Raises KeyError for a column that is not there."""


@dataclass(frozen=True)
class Suite:
    source: str
    """The folder of a URL where its files are published."""
    licence: str
    """As the publisher states it."""
    files: tuple[str, ...]
    read: Reader
    columns: tuple[str, ...]
    """Names of its columns of categories."""
    num_rows: int
    sha256: str
    """`digest` of its rows."""
    scattered: str | None = None
    """Where it is published as one text file a prompt: how to get that folder."""


def _table(prompt: str, columns: Sequence[str], delimiter: str, quoted: bool, _: str, text: str) -> Iterable[Row]:
    file = io.StringIO(text, newline="")
    if quoted:
        rows = csv.DictReader(file, delimiter=delimiter)
    else:
        rows = csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    for row in rows:
        yield Row(row[prompt], tuple(row[column] or "" for column in columns))


def _json_lines(columns: Sequence[str], _: str, text: str) -> Iterable[Row]:
    for row in map(json.loads, filter(str.strip, text.split("\n"))):
        yield Row(row["prompt"], tuple(row[column] for column in columns))


def _lists(_: str, text: str) -> Iterable[Row]:
    """A JSON object: category -> its prompts."""
    for category, prompts in json.loads(text).items():
        yield from (Row(prompt, (category,)) for prompt in prompts)


def _lines(_: str, text: str) -> Iterable[Row]:
    yield from (Row(line) for line in text.split("\n") if line.strip())


def _file_a_category(name: str, text: str) -> Iterable[Row]:
    category = PurePosixPath(name).stem.removesuffix("_val")
    yield from (Row(line, (category,)) for line in text.split("\n") if line.strip())


_COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")

SUITES: dict[str, Suite] = {
    "parti": Suite(
        f"{_GITHUB}/google-research/parti/5a657978134374ce28973948331b319adef164bd",
        "Apache-2.0",
        ("PartiPrompts.tsv",),
        partial(_table, "Prompt", ("Category", "Challenge"), "\t", False),
        ("Category", "Challenge"),
        1632,
        "1754464cb83302f6114e7be8048d85b8069677dd52f4b9f6ae222f9e3d1593e9",
    ),
    "hpsv2": Suite(
        f"{_GITHUB}/xiaobingling93-pixel/Ascend-ModelZoo-PyTorch/415a03cb168fa14c33bb83de92ef99d56b48da02"
        "/MindIE/MindIE-Torch/built-in/foundation/stable_diffusion_xl",
        "Apache-2.0 (HPDv2's four lists in one file of a third party)",
        ("hpsv2_benchmark_prompts.json",),
        _lists,
        ("style",),
        3200,
        "43158f6e6c905ff7ffcdb47add720424de0b2f865dfb696719b541978255bb66",
    ),
    "drawbench": Suite(
        f"{_GITHUB}/brianfitzgerald/smolmodels/aabbb44c43e9f42b88224d8f357405425b6c67f8/data",
        "none stated (a third party's copy of Google's sheet)",
        ("drawbench.csv",),
        partial(_table, "Prompt", ("Category",), ",", True),
        ("Category",),
        200,
        "46f9c346c4d433d60dbf6a5d31b327769dcb93952661df74f4bbccb0c8c6bdde",
    ),
    "geneval": Suite(
        f"{_GITHUB}/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts",
        "MIT",
        ("evaluation_metadata.jsonl",),
        partial(_json_lines, ("tag",)),
        ("tag",),
        553,
        "dcc28f639c9ff39fe2a1fc13b79d608dbf6e50a2f11d7192446fa8b3fbbb3a74",
    ),
    "t2i_compbench": Suite(
        f"{_GITHUB}/Karine-Huang/T2I-CompBench/1b7094991a57f3c22abdd4f6e8ba6c1a15517073/examples/dataset",
        "MIT",
        tuple(f"{name}_val.txt" for name in _COMPBENCH),
        _file_a_category,
        ("category",),
        2400,
        "bc2abd27ce63342542079273fce336fa18c51657ac9e00fdfc7ccc9a52da9cc7",
    ),
    "dpg_bench": Suite(
        f"{_GITHUB}/TencentQQGYLab/ELLA/3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench",
        "Apache-2.0",
        ("dpg_bench_prompts.jsonl",),
        partial(_json_lines, ()),
        (),
        1065,
        "9f1b36250bbb3839b32b213e1903d954c25c2c464fa26418ac25dddbbf76c4a6",
        "git clone --depth 1 https://github.com/TencentQQGYLab/ELLA, and name the folder ELLA/dpg_bench/prompts",
    ),
    "pick_a_pic": Suite(
        f"{_GITHUB}/yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/dataset/pickscore",
        "MIT (of the repository; from pickapic_v1)",
        ("test.txt",),
        _lines,
        (),
        2048,
        "44086b8ac6a5438f6626e107b73d4080c11b73c695eb0dbc3f4ba19aa133720a",
    ),
    "open_prompts": Suite(
        f"{_GITHUB}/krea-ai/open-prompts/84d1628e7b3d97a45d237311579faf39692f2a02/data",
        "none stated",
        ("1k.csv",),
        partial(_table, "prompt", (), ",", True),
        (),
        998,
        "49c4b2775ab31650e0f10eef58c4542f8367b5fa3d31de6d06c5ef0232cb2b4f",
    ),
}


def load(name: str, location: str | None = None) -> list[Row]:
    """A suite's rows in order, without those that have no prompt, from `location` or from where it is published.

    location: one file, or a folder that has the suite's files under their published names; a path, an fsspec URL, or
        a hub dataset as OWNER/NAME.

    Raises SuiteError for an unknown suite, for files that cannot be read, and for another number of rows or other text.
    """
    if name not in SUITES:
        raise SuiteError(f"suite {name!r}: unknown; allowed: {', '.join(SUITES)}")
    suite, where = SUITES[name], (location or SUITES[name].source).rstrip("/")
    rows = [Row(row.prompt.strip(), tuple(c.strip() for c in row.categories)) for row in _rows(name, where)]
    if len(rows) != suite.num_rows:
        raise SuiteError(
            f"suite {name}: {where} has {len(rows)} prompts, this suite has {suite.num_rows}: another version; "
            f"{_how_to_fetch(name)}"
        )
    for number, row in enumerate(rows):
        if empty := [column for column, said in zip(suite.columns, row.categories, strict=True) if not said]:
            raise SuiteError(f"suite {name}: prompt {number} of {where}, {row.prompt!r}, has no {empty[0]}")
    if (found := digest(rows)) != suite.sha256:
        raise SuiteError(
            f"suite {name}: {where} has {len(rows)} prompts, as it should, but other text: sha256 {found[:12]}… "
            f"where this suite has {suite.sha256[:12]}…; {_how_to_fetch(name)}"
        )
    return [row for row in rows if row.prompt]


def select(name: str, rows: Sequence[Row], category: str | None = None, limit: int | None = None) -> list[int]:
    """Indices of one category's rows, in whatever column, and of those `limit` at equal distances: suites are sorted.

    Raises SuiteError for a category that no row has, and for a limit below 1.
    """
    chosen = [index for index, row in enumerate(rows) if category is None or category in row.categories]
    if not chosen:
        columns = SUITES[name].columns
        known = sorted({f"{said} ({c})" for row in rows for c, said in zip(columns, row.categories, strict=True)})
        there = ", ".join(known) or "none, this suite has no categories"
        raise SuiteError(f"suite {name}: no category {category!r}; there are {there}")
    if limit is None or limit >= len(chosen):
        return chosen
    if limit < 1:
        raise SuiteError(f"suite {name}: a limit of {limit} prompts, allowed: 1 or more")
    return [chosen[position * len(chosen) // limit] for position in range(limit)]


def digest(rows: Iterable[Row]) -> str:
    """sha256 of prompts and categories in order, whatever file format they came in."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.prompt, *row.categories]).encode() + b"\n")
    return found.hexdigest()


def _rows(name: str, where: str) -> list[Row]:
    """As they stand in the files, checked for nothing but the layout."""
    suite = SUITES[name]
    if suite.scattered and Path(where).is_dir() and not (Path(where) / suite.files[0]).exists():
        return [Row(" ".join(path.read_text("utf-8").split())) for path in sorted(Path(where).glob("*.txt"))]
    rows: list[Row] = []
    for file in suite.files:
        alone = len(suite.files) == 1 and PurePosixPath(where).suffix == PurePosixPath(file).suffix
        path = where if alone else f"{where}/{file}"
        try:
            rows += suite.read(file, _text(path))
        except (OSError, ImportError) as error:
            raise SuiteError(f"suite {name}: {path} cannot be read ({error}); {_how_to_fetch(name)}") from None
        except KeyError as error:
            raise SuiteError(f"suite {name}: {path} has no column {error}; {_how_to_fetch(name)}") from None
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
            raise SuiteError(f"suite {name}: {path} has another layout ({error}); {_how_to_fetch(name)}") from None
    return rows


def _text(path: str) -> str:
    """A file's text by path, URL, or OWNER/NAME/FILE of a hub dataset."""
    if path.startswith(("http://", "https://")):
        with urllib.request.urlopen(path, timeout=60) as answer:
            return answer.read().decode("utf-8-sig")
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if "://" not in path and not Path(path).exists() and owner and file and not Path(owner).exists():
        path = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    with fsspec.open(path) as opened:
        return opened.read().decode("utf-8-sig")


def _how_to_fetch(name: str) -> str:
    """What to type; `--prompts` then names the file or folder."""
    suite = SUITES[name]
    if suite.scattered:
        return f"fetch it by: {suite.scattered} by --prompts"
    files = suite.files[0] if len(suite.files) == 1 else "{" + ",".join(suite.files) + "}"
    return f"fetch it by: curl --remote-name-all {suite.source}/{files}, and name the file or folder by --prompts"
