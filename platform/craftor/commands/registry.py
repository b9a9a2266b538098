"""`craftor register | list | show | promote | diff | export | merge`: versions of tuned encoders and their lineage.

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

Reference = Annotated[str, typer.Argument(metavar="ENCODER", help="name, name@alias, name/3, or a bundle's folder.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder whose mlflow.db is the store without MLFLOW_TRACKING_URI.")]
Base = Annotated[str | None, typer.Option("--base", help="Pipeline folder or hub id, if not where it was in training.")]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Give the version this alias; may be repeated.")]
RUNS = Path("runs")


@app.command()
def register(
    source: Annotated[Path, typer.Argument(help="A bundle's folder, or a run's that was trained elsewhere.")],
    name: Annotated[str | None, typer.Option("--name", help="By default the recipe's.")] = None,
    aliases: Aliases = None,
    runs: Runs = RUNS,
) -> None:
    """Register a bundle, or a run with its recipe, metrics and held-out scores, as a new version."""
    from craftor.adopt import adopt
    from craftor.registry import add, description_of, verify_bundle
    from craftor.tracking import answering

    connected = _connect(runs)
    with answering(connected):
        if (source / "recipe.toml").is_file():
            registered = adopt(connected, source, name, aliases or ())
        else:
            verify_bundle(source)
            _, registered = add(connected, source, name or description_of(source)["name"], aliases or ())
    print(f"models:/{registered['name']}/{registered['version']}")


@app.command("list")
def list_encoders(runs: Runs = RUNS) -> None:
    """Every version: aliases, the timesteps it acts in, what it changed for certain on held-out prompts."""
    from craftor.versions import versions

    table = Table("encoder", "aliases", "timesteps", "base", "held-out change", "recipe", "registered")
    for found in versions(_connect(runs)):
        tags = found.tags
        table.add_row(
            f"{found.name}/{found.version}",
            ", ".join(found.aliases),
            tags["craftor.window"],
            tags["craftor.base"],
            _changes(found),
            tags["craftor.run"],
            _date(found.created),
        )
    wide_console().print(table)


@app.command()
def show(reference: Reference, runs: Runs = RUNS) -> None:
    """One version: lineage (run, recipe, dataset), hashes, window, rewards, held-out scores."""
    from craftor.console import table as scores_table
    from craftor.encoders import fetch
    from craftor.registry import description_of, weights_sha256
    from craftor.versions import resolve

    connected = _connect(runs)
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
        **{f"tag {key}": value for key, value in found.tags.items() if not key.startswith("craftor.")},
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    console.print(table)
    if found.scores:
        console.print(scores_table(found.scores))


@app.command()
def promote(
    reference: Reference,
    alias: Annotated[str, typer.Option("--alias", help="The name that this version takes over.")] = "champion",
    runs: Runs = RUNS,
) -> None:
    """Point an alias at a version, after checking that its bundle is whole."""
    from craftor.encoders import fetch
    from craftor.tracking import answering
    from craftor.versions import resolve, versions

    connected = _connect(runs)
    found = resolve(connected, reference)
    fetch(found)
    before = [v for v in versions(connected) if v.name == found.name and alias in v.aliases]
    with answering(connected):
        connected.set_registered_model_alias(found.name, alias, found.version)
    was = f" (was {before[0].name}/{before[0].version})" if before else ""
    print(f"{found.name}@{alias} is {found.name}/{found.version}{was}")


@app.command()
def diff(
    a: Reference,
    b: Reference,
    out: Annotated[Path, typer.Option("--out", help="The grid of images.")] = Path("diff.png"),
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="A row of the grid; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    base: Base = None,
    runs: Runs = RUNS,
) -> None:
    """What differs: descriptions, weights by layer, and images of the same prompts and noise (base, A, B)."""
    from craftor.compare import default_prompts, differences, distances, save_grid
    from craftor.rollout import Rollout

    connected, console = _connect(runs), wide_console()
    diffuser, (one, other) = _load(connected, [a, b], base)
    table = Table("description", one.uri, other.uri)
    for key, values in differences(one.description, other.description).items():
        table.add_row(key, *("" if value is None else str(value) for value in values))
    console.print(table)
    for part in (part for part in one.modules if part in other.modules):
        table = Table(f"{part}: relative distance", "A from base", "B from base", "A from B")
        pairs = ((one, diffuser.encoders), (other, diffuser.encoders), (one, other.modules))
        columns = [distances(encoder.modules[part], parts[part]) for encoder, parts in pairs]
        for group in columns[0]:
            table.add_row(group, *(f"{column[group]:.2e}" for column in columns))
        console.print(table)
    rows = prompts or default_prompts()
    save_grid(diffuser, [one, other], rows, Rollout(num_steps=steps, guidance_scale=guidance), seed, out)
    for number, prompt in enumerate(rows, start=1):
        print(f"row {number}: {prompt}")
    print(f"{out} (columns: base, {one.uri}, {other.uri}; seed {seed})")


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

    diffuser, (encoder,) = _load(_connect(runs), [reference], base)
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

    diffuser, encoders = _load(_connect(runs), [reference for reference, _ in pairs], base)
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


def _connect(runs: Path) -> "MlflowClient":
    from craftor.quiet import hush
    from craftor.tracking import client

    hush()
    runs.mkdir(parents=True, exist_ok=True)
    return client(runs)


def _load(connected: "MlflowClient", references: list[str], base: str | None) -> "tuple[Diffuser, list[Encoder]]":
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


def _changes(found: "Version") -> str:
    """Metrics that no optimiser saw and whose interval excludes zero."""
    from craftor.statistics import excludes_zero

    sure = {name: row for name, row in found.scores.items() if row["held_out"] and excludes_zero(row["ci95"])}
    changes = ", ".join(f"{name} {row['delta']:+.3g}" for name, row in sure.items())
    return changes or ("nothing certain" if found.scores else "not evaluated")


def _date(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))
