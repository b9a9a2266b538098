"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Any

import typer

from craftor.overrides import parse_override

Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: --set optimizer.lr=1e-4")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; by default runs/<recipe name>")]


def overridden(texts: list[str] | None) -> dict[str, Any]:
    """`--set` texts as values by dotted key. Raises RecipeError for one that is not KEY=VALUE."""
    return dict(parse_override(text) for text in texts or [])
