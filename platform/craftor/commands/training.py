"""`craftor quickstart | train | prefix | sync | report`: runs, what they go on from, and what they show."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from craftor.commands.options import Out, Set, overridden
from craftor.preflight import check
from craftor.recipe import RecipeError, load, load_run

app = typer.Typer()


@app.command()
def quickstart(out: Out = None, overrides: Set = None) -> None:
    """Train, register, evaluate and report on the embedded micro model: the whole idea in minutes."""
    from craftor.console import table
    from craftor.quickstart import quickstart as run

    folder = out or Path("runs/quickstart")
    report = run(folder, overridden(overrides))
    Console().print(table(report["metrics"]))
    for name in ("report.html", "report.png", "report.json", "bundle"):
        print(folder / name)
    if registered := report["registered"]:
        print(f"registered in MLflow: models:/{registered['name']}/{registered['version']}")
    print("next: `craftor serve` draws with it, and `craftor customize` puts an object of yours into new images;")
    print("what they need first is in the README: Serve, An object in new images")


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Go on with the run in this folder, or URL.")] = None,
    out: Out = None,
    overrides: Set = None,
    accept: Annotated[bool, typer.Option("--accept", help="Resume by a recipe that differs from the run's.")] = False,
) -> None:
    """Run a recipe, or go on with an interrupted run."""
    if recipe is None and resume is None:
        raise RecipeError("give a recipe, or --resume RUN")
    if resume is not None:
        away = "://" in resume
        if (overrides and recipe is None) or (out and not away):
            raise RecipeError("--resume goes on with the run's own recipe and folder; --set and --out do not apply")
        if not away:
            load_run(Path(resume))
        from craftor.job import resume as go_on

        folder = Path(resume)
        if away:
            from craftor.storage import get_run

            folder = out or Path("runs") / resume.rstrip("/").rsplit("/", 1)[1]
            _refuse_another_run(resume, folder)
            get_run(resume.rstrip("/"), folder)
        trained = go_on(folder, load(recipe, overridden(overrides)) if recipe else None, accept)
    else:
        assert recipe is not None
        checked = load(recipe, overridden(overrides))
        check(checked, recipe)  # before the imports below, which take seconds
        from craftor.job import train as start

        trained = start(checked, recipe, out or Path("runs") / checked.name)
    print(trained.checkpoint)
    if trained.registered:
        print(f"registered in MLflow: models:/{trained.registered['name']}/{trained.registered['version']}")


def _refuse_another_run(url: str, folder: Path) -> None:
    """Raises RecipeError where a folder holds anything but the run whose home is `url`: its files would be replaced."""
    from craftor.storage import open_url

    if not folder.exists() or not any(folder.iterdir()):
        return
    home = load_run(folder).run.storage if (folder / "recipe.toml").is_file() else None
    if home is None or open_url(home) != open_url(url):
        raise RecipeError(f"{folder}: holds something else than the run at {url}; choose another folder with --out")


@app.command()
def prefix(
    recipe: Annotated[Path, typer.Argument(help="A reward-tuning recipe.")],
    out: Annotated[str, typer.Option("--out", help="A folder or fsspec URL for the cache.")],
    workers: Annotated[int, typer.Option(help="Actors.")] = 2,
    overrides: Set = None,
) -> None:
    """Compute the denoising steps before the window once, for every run that shares them; goes on where it stopped."""
    checked = load(recipe, overridden(overrides))
    check(checked, recipe)
    from craftor.inputs import fill_prefix_cache

    print(f"{fill_prefix_cache(checked, recipe, out, workers)} samples in {out}")
    print(f'use it with: --set task.prefix=\'{{mode = "cache", cache = "{out}"}}\'')


@app.command()
def sync(run: Annotated[Path, typer.Argument(help="A run folder whose MLflow server was away.")]) -> None:
    """Send metrics to MLflow that an outage held back, and register the encoder if that is still due."""
    from craftor.job import sync as send

    sent = send(run)
    if sent.registered is None:
        print(f"metrics are sent; no encoder is registered of {run}: it has not ended, or its recipe registers none")
    else:
        print(f"registered in MLflow: models:/{sent.registered['name']}/{sent.registered['version']}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder with a report.json.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table for a README instead.")] = False,
) -> None:
    """Draw report.html and report.png again from a run's report.json."""
    if not (run / "report.json").is_file():
        raise RecipeError(f"{run}: no report.json in it, which craftor quickstart writes; of others: craftor compare")
    if as_markdown:
        from craftor.verdict import markdown

        print(markdown(json.loads((run / "report.json").read_text())))
        return
    from craftor.report import write_report

    for path in write_report(run):
        print(path)
