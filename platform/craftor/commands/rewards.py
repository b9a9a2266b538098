"""`craftor rewards list | fetch | check`: which rewards there are, their public weights, and whether they work here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from craftor_rewards.probes import Reading

app = typer.Typer(no_args_is_help=True, help="The reward models: list them, fetch public weights, check them.")

MICRO = {"micro:reward_clip": "clip_score", "micro:aesthetic": "aesthetic", "micro:preference": "pick_score"}
"""Shipped weights -> the kind of reward they are for."""


@app.command("list")
def list_rewards() -> None:
    """Every kind with the weights that are known for it."""
    from craftor_rewards import CATALOGUE, REWARDS
    from craftor_rewards.loading import is_here

    table = Table("kind", "weights", "input", "range", "gradient", "prompt", "licence", "size", "here")
    shipped = [(name, kind, 64, "Apache-2.0", "", True) for name, kind in MICRO.items()]
    public = [
        (name, entry.kind, entry.input_size, entry.licence, f"{entry.gigabytes:g} GB", is_here(name))
        for name, entry in CATALOGUE.items()
        if entry.kind in REWARDS
    ]
    for kind, reward in REWARDS.items():
        fit, score_range = getattr(reward, "fit", "none"), getattr(reward, "score_range", "")
        bounds = score_range if isinstance(score_range, str) else "{:g} to {:g}".format(*score_range)
        gradient, prompt = ("yes" if getattr(reward, key) else "no" for key in ("differentiable", "needs_prompt"))
        rows = [row for row in [*shipped, *public] if row[1] == kind] or [("", kind, None, "", "", True)]
        for name, _, size, licence, space, here in rows:
            seen = f"{size} px, {fit}" if size else fit
            table.add_row(kind, name, seen, bounds, gradient, prompt, licence, space, "yes" if here else "no")
    wide_console().print(table)


@app.command()
def fetch(names: Annotated[list[str], typer.Argument(help="Short names from `craftor rewards list`.")]) -> None:
    """Download public weights, with whatever they need, and check their hashes."""
    from craftor_rewards import CATALOGUE
    from craftor_rewards.loading import find

    unknown = [name for name in names if name not in CATALOGUE]
    if unknown:
        _fail(f"unknown weights {', '.join(unknown)}; available: {', '.join(CATALOGUE)}")
    wanted = dict.fromkeys(name for given in names for name in (given, *CATALOGUE[given].needs))
    for name in wanted:
        entry = CATALOGUE[name]
        typer.echo(f"{name}: {entry.repo}, {entry.gigabytes:g} GB, licence {entry.licence}")
        try:
            typer.echo(find(name))
        except (FileNotFoundError, ValueError) as error:
            _fail(f"{error}" + (f" ({error.__cause__})" if error.__cause__ else ""))


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Weights of the list, or KIND=WEIGHTS; by default the shipped ones and all that are here."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write what is measured here as what must be: on a trusted machine only.")
    ] = False,
    golden: Annotated[Path | None, typer.Option(help="Recorded values; by default those shipped.")] = None,
    device: Annotated[str, typer.Option(help="Where to score.")] = "cpu",
) -> None:
    """Score the probe images and compare with the recorded values; exit code 1 if anything differs."""
    from transformers.utils import logging

    from craftor_rewards import probes

    logging.disable_progress_bar()
    path, console = golden or probes.GOLDEN, wide_console()
    recorded, failed = probes.load_golden(path), []
    for name, (kind, weights) in _chosen(names).items():
        try:
            readings, files = _measure(kind, weights, device)
        except (FileNotFoundError, ValueError) as error:
            _fail(f"{kind} {name}: {error}", code=1)
        if record:
            probes.record(f"{kind} {name}", readings, files, path)
            console.print(f"{kind} {name}: recorded in {path}")
        elif (entry := recorded.get(f"{kind} {name}")) is None:
            console.print(f"{kind} {name}: no recorded values in {path}; --record writes them on a trusted machine")
            failed += [name] if names else []
        else:
            rows = probes.compare(entry["probes"], readings)
            if files == entry["weights"] and all(row.is_equal for row in rows):
                console.print(f"{kind} {name}: {len(rows)} values as recorded")
            else:
                failed.append(name)
                cause = f"weights {'are' if files == entry['weights'] else 'ARE NOT'} the recorded ones"
                versions = ", ".join(f"{library} {version}" for library, version in entry["recorded_with"].items())
                console.print(f"{kind} {name}: {cause}; recorded with {versions}")
                console.print(_table(rows))
    if failed:
        _fail(f"not as recorded: {', '.join(failed)}; do not train or evaluate with these here", code=1)


def _chosen(names: list[str] | None) -> dict[str, tuple[str, str]]:
    """Name -> kind and weights."""
    from craftor_rewards import CATALOGUE, REWARDS
    from craftor_rewards.loading import is_here

    kinds = {**MICRO, **{name: entry.kind for name, entry in CATALOGUE.items() if entry.kind in REWARDS}}
    chosen = {}
    for name in names or [name for name in kinds if name in MICRO or is_here(name)]:
        kind, separator, weights = name.partition("=")
        if name not in kinds and not separator:
            _fail(f"unknown weights '{name}'; available: {', '.join(kinds)}, or KIND=WEIGHTS")
        chosen[weights or name] = (kind, weights) if separator else (kinds[name], name)
    return chosen


def _measure(kind: str, weights: str, device: str) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Readings of the probes, and the hashes of the files they were made with; none for a reward without files."""
    from torch import nn

    from craftor.locate import locate
    from craftor_rewards import build, probes
    from craftor_rewards.loading import entry_of, find

    reward = build(kind, locate(weights))
    if isinstance(reward, nn.Module):
        reward.to(device)
    readings = probes.measure(reward, kind)
    if ":" in kind and not Path(weights).exists():
        return readings, {}
    path, entry = find(locate(weights)), entry_of(weights)
    return readings, probes.fingerprint(path / entry.file if entry and path.is_dir() else path)


def _table(rows: "list[Reading]") -> Table:
    table = Table("probe", "value", "expected", "got", "")
    for row in rows:
        table.add_row(row.probe, row.what, f"{row.expected:.6g}", f"{row.got:.6g}", "" if row.is_equal else "differs")
    return table


def wide_console() -> Console:
    """Wide enough for the tables wherever output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
