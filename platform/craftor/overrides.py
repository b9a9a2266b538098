"""`--set key.path=value`: a change to a recipe's data before it is validated."""

import tomllib
from pathlib import Path
from typing import Any

from craftor.explain import RecipeError


def parse_override(text: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value); the value is read as TOML, else taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected key.path=value")
    try:
        return key, tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key, value


def override(data: dict[str, Any], dotted: str, value: Any, path: Path) -> None:
    """Set a value in a recipe's data, in place; `path` is the recipe's, for the error.

    Raises RecipeError where a part of the key on the way is a value.
    """
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: --set {dotted}: {parent} is a value, not a section")
    data[last] = value
