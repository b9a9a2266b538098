"""Prompt suites by name: the files by which text-to-image models are compared -> their prompts, with categories.

No suite's text is shipped. It is read from where it is published, or from a file, folder, URL or hub dataset of the
user's, and its content is checked: scores on another version of a suite are not comparable, whatever it is called.
"""

import hashlib
import json
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import fsspec
from huggingface_hub import hf_hub_download

from craftor.suite_catalogue import SUITES, Row


class SuiteError(ValueError):
    """A suite that cannot be read, is another version, or lacks a category."""


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
