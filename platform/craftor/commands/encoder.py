"""`craftor diff | export | merge`: what is made of registered encoders, or of bundles' folders."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from craftor.commands.registry import (
    RUNS,
    Base,
    Guidance,
    Prompts,
    Reference,
    Runs,
    Seed,
    Steps,
    connect,
    draw,
    load_encoders,
)
from craftor.commands.rewards import wide_console
from craftor.recipe import RecipeError

app = typer.Typer()


@app.command()
def diff(
    a: Reference,
    b: Reference,
    out: Annotated[Path, typer.Option("--out", help="The grid of images.")] = Path("diff.png"),
    prompts: Prompts = None,
    steps: Steps = 20,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    base: Base = None,
    runs: Runs = RUNS,
) -> None:
    """What differs: descriptions, scores, weights by layer, and images of the same prompts and noise (base, A, B)."""
    from craftor.compare import differences, distances
    from craftor.console import table as scores_table
    from craftor.versions import resolve

    connected, console = connect(runs), wide_console()
    diffuser, (one, other) = load_encoders(connected, [a, b], base)
    table = Table("description", one.uri, other.uri)
    for key, values in differences(one.description, other.description).items():
        table.add_row(key, *("" if value is None else str(value) for value in values))
    console.print(table)
    for encoder in (one, other):
        if encoder.version is not None and (scores := resolve(connected, encoder.uri).scores):
            console.print(f"{encoder.uri} on held-out prompts:", scores_table(scores))
    for part in (part for part in one.modules if part in other.modules):
        table = Table(f"{part}: relative distance", "A from base", "B from base", "A from B")
        pairs = ((one, diffuser.encoders), (other, diffuser.encoders), (one, other.modules))
        columns = [distances(encoder.modules[part], parts[part]) for encoder, parts in pairs]
        for group in columns[0]:
            table.add_row(group, *(f"{column[group]:.2e}" for column in columns))
        console.print(table)
    draw(diffuser, [one, other], prompts, steps, guidance, seed, out)


@app.command()
def export(
    reference: Reference,
    to: Annotated[str, typer.Option("--to", help="diffusers or comfyui.")],
    out: Annotated[Path, typer.Option("--out", help="An empty or missing folder.")],
    base: Base = None,
    runs: Runs = RUNS,
) -> None:
    """Write an encoder for other programs, with a model card that tells its lineage."""
    if to not in ("diffusers", "comfyui"):
        raise RecipeError(f"--to {to}: allowed are diffusers, comfyui")
    _check_empty(out)
    from craftor.export import FORMATS

    diffuser, (encoder,) = load_encoders(connect(runs), [reference], base)
    for path in FORMATS[to](encoder, diffuser, out):
        print(path)


@app.command()
def merge(
    members: Annotated[list[str], typer.Argument(metavar="ENCODER=WEIGHT...", help="The base has what they leave.")],
    name: Annotated[str, typer.Option("--name", help="Of the new encoder.")],
    out: Annotated[Path, typer.Option("--out", help="An empty or missing folder for its bundle.")],
    base: Base = None,
    runs: Runs = RUNS,
) -> None:
    """Sum the weights of encoders of one base into a new one (weight space; mixing at use is in output space)."""
    pairs = [_member(text) for text in members]
    _check_empty(out)
    from craftor.merging import merge as run

    diffuser, encoders = load_encoders(connect(runs), [reference for reference, _ in pairs], base)
    weights = [weight for _, weight in pairs]
    print(run(diffuser, list(zip(encoders, weights, strict=True)), name, out))
    print(f"register it with: craftor register {out}")


def _member(text: str) -> tuple[str, float]:
    reference, _, weight = text.rpartition("=")
    try:
        return reference, float(weight)
    except ValueError:
        raise RecipeError(f"{text!r}: expected ENCODER=WEIGHT, as in aesthetic@champion=0.6") from None


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out}: exists and is not an empty folder")
