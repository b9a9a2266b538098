"""The prompt suites there are: where each is published, its licence, how its files are read, the hash of its rows."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

_GITHUB = "https://raw.githubusercontent.com"


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
