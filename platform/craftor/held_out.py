"""Prompts to judge by: lines of JSON with a `prompt` and, in the micro world, a `description` for the referee."""

import json
from pathlib import Path
from typing import Any

import fsspec

from craftor.locate import locate


class HeldOutError(ValueError):
    """A file that holds no such prompts, or too few; the message names the recipe's key."""


def read(section: str, path: str, num: int | None = None) -> list[dict[str, Any]]:
    """All rows, or the first `num`, of the file or fsspec URL that `prompts` of a recipe's section names.

    Raises HeldOutError where it cannot be read, is not of this form, or has fewer rows.
    """
    where, source = f"{section}.prompts = {path!r}", locate(path)
    if Path(source.split("?")[0]).suffix.lower() != ".jsonl":
        raise HeldOutError(f'{where}: allowed: a .jsonl file, each line an object with a prompt: {{"prompt": "…"}}')
    try:
        with fsspec.open(source, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        raise HeldOutError(f"{where}: no such file") from None
    except (OSError, ImportError, ValueError) as error:  # away, no package for its scheme, not UTF-8, not JSON
        raise HeldOutError(f"{where}: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise HeldOutError(f"{where}: prompt {number} is no object with a text called prompt: {str(row)[:80]}")
    if not rows:
        raise HeldOutError(f"{where}: holds no prompt")
    if num is not None and len(rows) < num:
        raise HeldOutError(f"{section}.num_prompts = {num}: {path} has {len(rows)} prompts")
    return rows[:num]
