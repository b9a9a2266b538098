"""`craftor search | search-mix`: trials over a recipe's keys, and mixtures of encoders that exist already."""

from pathlib import Path
from typing import Annotated

import typer

from craftor.commands.options import Out, Set, overridden
from craftor.preflight import check
from craftor.recipe import RecipeError, load

app = typer.Typer()


@app.command()
def search(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe with a [search] section.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the search in this folder.")] = None,
    out: Out = None,
    overrides: Set = None,
) -> None:
    """Search reward weights, windows and any other key of a recipe; register the best encoder."""
    if (recipe is None) == (resume is None):
        raise RecipeError("give either a recipe or --resume SEARCH")
    if resume is not None:
        if overrides or out:
            raise RecipeError("--resume goes on with the search's own recipe and folder; --set and --out do not apply")
        from craftor.searching.search import resume as go_on

        found = go_on(resume)
    else:
        assert recipe is not None
        checked = load(recipe, overridden(overrides))
        check(checked, recipe)
        from craftor.searching.search import search as start

        found = start(checked, recipe, out or Path("runs") / checked.name)
    for page in found.pages:
        print(page)
    for registered in found.registered:
        print(f"registered in MLflow: models:/{registered['name']}/{registered['version']}")


@app.command("search-mix")
def search_mix(
    encoders: Annotated[list[str] | None, typer.Argument(help="Run or bundle folders, or models:/NAME@ALIAS.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Its [search] says what counts.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the search in this folder.")] = None,
    out: Out = None,
    overrides: Set = None,
) -> None:
    """Search the mixture of tuned encoders, their weights and windows, by generating and scoring alone."""
    if resume is not None:
        if encoders or recipe or overrides or out:
            raise RecipeError("--resume goes on with the search's own recipe, encoders and folder")
        from craftor.searching.mix import resume_mix

        mixed = resume_mix(resume)
    else:
        if recipe is None or not encoders:
            raise RecipeError("give encoders and --recipe RECIPE, or --resume SEARCH")
        checked = load(recipe, overridden(overrides))
        check(checked, recipe)
        from craftor.searching.mix import search_mix as start

        mixed = start(checked, recipe, encoders, out or Path("runs") / f"{checked.name}-mix")
    for page in mixed.pages:
        print(page)
