"""`craftor objects describe | pairs`: from folders of pictures to the rows that an object encoder trains on."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from craftor.recipe import RecipeError

if TYPE_CHECKING:
    from ray.exceptions import RayError

app = typer.Typer(no_args_is_help=True, help="Prepare pictures of objects: captions, masks, training pairs.")
Workers = Annotated[int, typer.Option(min=1, help="Actors.")]


@app.command()
def describe(
    settings: Annotated[Path, typer.Argument(help="A TOML file: images, captioner, attributes, masks.")],
    out: Annotated[Path, typer.Option("--out", help="A folder; what is described there is not described again.")],
    workers: Workers = 1,
) -> None:
    """Give every picture a caption and a mask."""
    from craftor.object_data.settings import load

    checked = load(settings)
    from ray.exceptions import RayError

    from craftor.cluster import ray_session
    from craftor.object_data import describing

    with ray_session(workers):
        try:
            found = describing.describe(checked, out, workers)
        except ValueError as error:
            raise RecipeError(f"{settings}: {error}") from None
        except RayError as error:
            raise RecipeError(f"{settings}: {_cause(error)}") from None
    for row in found.left_out:
        print(f"left out: {row['key']}: {row['reason']}")
    print(f"{found.num_pictures} pictures described in {out}, {found.num_made} of the folder's looked at just now")


@app.command()
def pairs(
    described: Annotated[Path, typer.Argument(help="What `craftor objects describe` wrote.")],
    model: Annotated[str, typer.Option(help="The pipeline that the object encoder will be for.")],
    image_encoder: Annotated[str, typer.Option(help="The CLIP it will see objects by.")],
    out: Annotated[Path, typer.Option("--out", help="A folder for the rows; what is in it goes.")],
    general: Annotated[
        Path | None, typer.Option(help="A folder of Parquet with columns image (a file's bytes) and caption.")
    ] = None,
    domain_share: Annotated[float, typer.Option(help="Share of rows with an object.")] = 0.5,
    repeats: Annotated[
        int, typer.Option(min=1, help="How often a picture is a target, each time with a new pair.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of pairs, fills and order.")] = 0,
    workers: Workers = 1,
) -> None:
    """Make the rows for `task.kind = "object_encoder"`: target, mask, caption, and another picture as the reference."""
    if not 0 < domain_share <= 1:
        raise RecipeError(f"--domain-share {domain_share}: allowed: above 0, at most 1")
    from ray.exceptions import RayError

    from craftor.cluster import ray_session
    from craftor.object_data.pairing import Made, pair

    made = Made(_absolute(model), _absolute(image_encoder), seed)
    with ray_session(workers):
        try:
            found = pair(described, general, out, made, domain_share=domain_share, repeats=repeats, num_actors=workers)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        except RayError as error:
            raise RecipeError(_cause(error)) from None
    print(
        f"{found.num_rows} rows in {out}, {found.num_domain} of them with one of {found.num_objects} objects; "
        f"{found.num_alone} objects have one picture and are their own, disturbed reference"
    )


@app.command()
def gauge(
    encoder: Annotated[str, typer.Argument(help="An object encoder: a run, a bundle, or models:/NAME@ALIAS.")],
    described: Annotated[
        Path, typer.Argument(help="Objects that it was not trained on, by `craftor objects describe`.")
    ],
    limit: Annotated[int, typer.Option(min=2, help="So many objects at most.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    runs: Annotated[Path, typer.Option("--runs", help="Folder whose mlflow.db is the store.")] = Path("runs"),
) -> None:
    """Does it carry identity, does it copy? Losses on fixed noise, soon telling; scores of a registered version."""
    from rich.console import Console

    from craftor.customize import load
    from craftor.object_data.held_out import held_out_objects, metrics, tell
    from craftor.object_gauges import gauge as measure

    customizer = load(encoder, runs=runs)
    try:
        held_out = held_out_objects(described, customizer, limit)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    found = measure(customizer, held_out, seed)
    for line in tell(found, len(held_out.images)):
        Console().print(line)
    if encoder.startswith("models:/"):
        from craftor.registry import score
        from craftor.tracking import answering, client
        from craftor.versions import resolve

        connected = client(runs)
        version = resolve(connected, encoder)
        with answering(connected):
            score(connected, {"name": version.name, "version": version.version}, metrics(found))


def _cause(error: "RayError") -> str:
    """What an actor stumbled over comes last in Ray's error, in one line or several; above it is how it got here."""
    told = str(error)
    begun = [found.start() for found in re.finditer(r"^[\w.]*[A-Z]\w*: ", told, re.MULTILINE)]
    return " ".join(told[begun[-1] if begun else 0 :].split())


def _absolute(path: str) -> str:
    """Actors have another working directory."""
    return str(Path(path).resolve()) if Path(path).exists() else path
