"""`craftor register | list | show | promote`: versions of tuned encoders and their lineage.

An ENCODER is `name` (its newest version), `name@alias`, `name/3`, or a bundle's folder.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from craftor.commands.rewards import wide_console
from craftor.recipe import RecipeError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from craftor.diffuser import Diffuser
    from craftor.encoders import Encoder
    from craftor.versions import Version

app = typer.Typer()

Registered = Annotated[str, typer.Argument(metavar="ENCODER", help="name (its newest version), name@alias or name/3.")]
Reference = Annotated[str, typer.Argument(metavar="ENCODER", help="name, name@alias, name/3, or a bundle's folder.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder whose mlflow.db is the store without MLFLOW_TRACKING_URI.")]
Base = Annotated[str | None, typer.Option("--base", help="Pipeline folder or hub id, if not where it was in training.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="A row of the grid; may be repeated.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(min=1, help="Guidance scale.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Give the version this alias; may be repeated.")]
RUNS = Path("runs")


@app.command()
def register(
    source: Annotated[Path, typer.Argument(help="A bundle's folder, or a run's that was trained elsewhere.")],
    name: Annotated[str | None, typer.Option("--name", help="By default the recipe's.")] = None,
    aliases: Aliases = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="KEY=VALUE of the version; may be repeated.")] = None,
    runs: Runs = RUNS,
) -> None:
    """Register a bundle, or a run with its recipe, metrics and held-out scores, as a new version."""
    pairs = [_tag(text) for text in tags or ()]
    from craftor.adopt import adopt
    from craftor.registry import add, description_of, verify_bundle
    from craftor.tracking import answering

    connected = connect(runs)
    with answering(connected):
        if (source / "recipe.toml").is_file():
            registered = adopt(connected, source, name, aliases or ())
        else:
            verify_bundle(source)
            _, registered = add(connected, source, name or description_of(source)["name"], aliases or ())
        for key, value in pairs:
            connected.set_model_version_tag(registered["name"], registered["version"], key, value)
    print(f"models:/{registered['name']}/{registered['version']}")


@app.command("list")
def list_encoders(runs: Runs = RUNS) -> None:
    """Every version: aliases, the timesteps it acts in, what it changed for certain on held-out prompts."""
    from craftor.versions import versions

    table = Table("encoder", "aliases", "timesteps", "base", "held-out change", "recipe", "tags", "registered")
    for found in versions(connect(runs)):
        tags = found.tags
        table.add_row(
            f"{found.name}/{found.version}",
            ", ".join(found.aliases),
            tags["craftor.window"],
            tags["craftor.base"],
            _changes(found),
            tags["craftor.run"],
            ", ".join(f"{key}={value}" for key, value in found.own_tags.items()),
            _date(found.created),
        )
    wide_console().print(table)


@app.command()
def show(
    reference: Registered,
    grid: Annotated[Path | None, typer.Option("--grid", help="Also draw base and encoder into this PNG.")] = None,
    prompts: Prompts = None,
    steps: Steps = 20,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    base: Base = None,
    runs: Runs = RUNS,
) -> None:
    """One version: lineage (run, recipe, dataset), hashes, window, rewards, held-out scores; images if asked."""
    from craftor.console import table as scores_table
    from craftor.encoders import fetch
    from craftor.registry import description_of, weights_sha256
    from craftor.versions import resolve

    connected = connect(runs)
    found = resolve(connected, reference)
    bundle = fetch(found)
    about, console = description_of(bundle), wide_console()
    window, lineage = about["window"], about.get("lineage", {})
    table = Table("", f"{found.name}/{found.version}", show_header=True)
    rows = {
        "aliases": ", ".join(found.aliases),
        "registered": _date(found.created),
        "timesteps": f"{window['first_timestep']}..{window['last_timestep']}",
        "weights sha256": weights_sha256(bundle),
        "base": about["base"]["model"],
        "base encoder sha256": about["base"]["text_encoder_sha256"],
        "rewards": ", ".join(f"{name} ({r['kind']}) x {r['weight']:g}" for name, r in about.get("rewards", {}).items()),
        "merged from": ", ".join(f"{m['uri']} x {m['weight']:g}" for m in about.get("merged", [])),
        "MLflow run": found.run_id or lineage.get("run_id", ""),
        "recipe": lineage.get("recipe", ""),
        "dataset sha256": lineage.get("dataset_sha256", ""),
        "made with": f"craftor {about['craftor']}",
        "bundle": str(bundle),
        **{f"tag {key}": value for key, value in found.own_tags.items()},
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    console.print(table)
    if found.scores:
        console.print(scores_table(found.scores))
    if grid is not None:
        diffuser, (encoder,) = load_encoders(connected, [found.uri], base)
        draw(diffuser, [encoder], prompts, steps, guidance, seed, grid)


@app.command()
def promote(
    reference: Registered,
    alias: Annotated[str, typer.Option("--alias", help="The name that this version takes over.")] = "champion",
    runs: Runs = RUNS,
) -> None:
    """Point an alias at a version, after checking that its bundle is whole.

    `name@candidate` makes the candidate the champion. `name@champion`, which would move nothing, means the newest.
    """
    from craftor.encoders import fetch
    from craftor.tracking import answering
    from craftor.versions import resolve, versions

    connected = connect(runs)
    found = resolve(connected, reference.removesuffix(f"@{alias}"))
    fetch(found)
    before = [v for v in versions(connected) if v.name == found.name and alias in v.aliases]
    with answering(connected):
        connected.set_registered_model_alias(found.name, alias, found.version)
    was = f" (was {before[0].name}/{before[0].version})" if before else ""
    print(f"{found.name}@{alias} is {found.name}/{found.version}{was}")


def _tag(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key or not value or key.startswith("craftor."):
        raise RecipeError(f"--tag {text}: expected KEY=VALUE, with a key that does not begin with craftor.")
    return key, value


def connect(runs: Path) -> "MlflowClient":
    from craftor.quiet import hush
    from craftor.tracking import client

    hush()
    runs.mkdir(parents=True, exist_ok=True)
    return client(runs)


def load_encoders(
    connected: "MlflowClient", references: list[str], base: str | None
) -> "tuple[Diffuser, list[Encoder]]":
    """Encoders, and the base that the first of them was trained from."""
    from craftor.diffuser import load
    from craftor.encoders import fetch, load_encoder
    from craftor.recipe import Model
    from craftor.registry import description_of
    from craftor.versions import resolve

    found: list[Version | Path] = [
        Path(text) if (Path(text) / "encoder.toml").is_file() else resolve(connected, text) for text in references
    ]
    first = found[0] if isinstance(found[0], Path) else fetch(found[0])
    try:
        diffuser = load(Model(path=base or description_of(first)["base"]["model"]))
    except ValueError as error:
        raise RecipeError(f"the base of {references[0]} is not here: {error}; or say where with --base") from None
    return diffuser, [load_encoder(each, diffuser) for each in found]


def draw(
    base: "Diffuser",
    encoders: "list[Encoder]",
    prompts: list[str] | None,
    steps: int,
    guidance: float,
    seed: int,
    out: Path,
) -> None:
    """The grid of images, and which is which."""
    from craftor.compare import default_prompts, save_grid
    from craftor.rollout import Rollout

    rows = prompts or default_prompts()
    save_grid(base, encoders, rows, Rollout(num_steps=steps, guidance_scale=guidance), seed, out)
    for number, prompt in enumerate(rows, start=1):
        print(f"row {number}: {prompt}")
    print(f"{out} (columns: {', '.join(['base', *(encoder.uri for encoder in encoders)])}; seed {seed})")


def _changes(found: "Version") -> str:
    """Metrics that no optimiser saw and whose interval excludes zero."""
    from craftor.statistics import excludes_zero

    sure = {name: row for name, row in found.scores.items() if row["held_out"] and excludes_zero(row["ci95"])}
    changes = ", ".join(f"{name} {row['delta']:+.3g}" for name, row in sure.items())
    return changes or ("nothing certain" if found.scores else "not evaluated")


def _date(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))
