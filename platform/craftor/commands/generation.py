"""`craftor serve | customize`: images, over HTTP from any mixture of encoders, or here of a given object."""

from pathlib import Path
from typing import Annotated

import typer

from craftor.recipe import RecipeError

app = typer.Typer()


@app.command()
def serve(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, such as recipes/micro_serve.toml.")],
    port: Annotated[int | None, typer.Option(help="Instead of the file's.")] = None,
) -> None:
    """Serve images from any mixture of encoders over HTTP, on Ray Serve, with a playground for the browser."""
    from craftor.serving.settings import load as load_serving

    settings = load_serving(recipe)
    if port is not None:
        settings = settings.model_copy(update={"http": settings.http.model_copy(update={"port": port})})
    from craftor.serving.preflight import check

    check(settings, recipe)
    from craftor.serving.deployment import serve_for_ever

    serve_for_ever(settings)


@app.command()
def customize(
    image: Annotated[
        list[Path],
        typer.Option(help="A picture of the object; its transparency is its mask. Several are several objects."),
    ],
    prompt: Annotated[str, typer.Option(help="The scene to put it in.")],
    mask: Annotated[
        list[Path] | None, typer.Option(help="Where the object is: white, or opaque. One for each --image, or none.")
    ] = None,
    region: Annotated[
        list[Path] | None,
        typer.Option(help="Where in the new picture the object may be: white. One for each --image, or none."),
    ] = None,
    encoder: Annotated[str, typer.Option(help="An object encoder: a run, a bundle, or models:/NAME@ALIAS.")] = (
        "runs/micro-object-encoder"
    ),
    out: Annotated[Path, typer.Option(help="The picture, or a sheet of several.")] = Path("customized.png"),
    num: Annotated[int, typer.Option(min=1, help="Pictures to make.")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    text_weight: Annotated[float, typer.Option(min=0, help="Guidance by the prompt.")] = 4.0,
    object_weight: Annotated[float, typer.Option(min=0, help="Guidance by the object.")] = 4.0,
    object_from: Annotated[int, typer.Option(min=0, help="First denoising step that sees the object.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    mix: Annotated[
        list[str] | None, typer.Option(help="A tuned text encoder and its weight: models:/NAME@ALIAS=0.5; or several.")
    ] = None,
) -> None:
    """Put the object of one picture into new ones, in one pass of its encoder."""
    for path in (*image, *(mask or []), *(region or [])):
        if not path.is_file():
            raise RecipeError(f"{path}: no such file")
    for name, given in (("--mask", mask), ("--region", region)):
        if given and len(given) != len(image):
            raise RecipeError(f"{len(given)} {name} for {len(image)} --image; allowed: one for each, in order, or none")
    mixture = dict(_weighted(text) for text in mix or [])
    from craftor.customize import Guidance
    from craftor.customize_files import Shown, customize_file

    none = [None] * len(image)
    shown = [Shown(*files) for files in zip(image, mask or none, region or none, strict=True)]
    guidance = Guidance(steps, text_weight, object_weight, object_from)
    print(customize_file(shown, prompt, encoder, out, num, seed, guidance, mixture))


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise RecipeError(f"--mix {text}: expected ENCODER=WEIGHT, for example models:/style@champion=0.5") from None
