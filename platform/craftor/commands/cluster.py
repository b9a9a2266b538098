"""`craftor doctor | plan | audit`: before a run on many machines, and after it."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from craftor.commands.options import Out, Set, overridden
from craftor.preflight import check
from craftor.recipe import RecipeError, load

app = typer.Typer()


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe whose weights, prompts and storage to look for.")
    ] = None,
    out: Out = None,
    overrides: Set = None,
) -> None:
    """Check the cluster of RAY_ADDRESS, or this machine: versions, GPUs, attention, storage, MLflow, weights, token."""
    checked = load(recipe, overridden(overrides)) if recipe else None
    from craftor.cluster import ray_session
    from craftor.console import findings_table
    from craftor.doctor import examine

    folder = out or Path("runs") / (checked.name if checked else "doctor")
    with ray_session(0):
        findings = examine(checked, recipe or Path("recipe"), folder, "RAY_ADDRESS" in os.environ)
    Console().print(findings_table(findings))
    raise typer.Exit(any(finding.verdict == "failure" for finding in findings))


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A reward-tuning recipe.")],
    gpu: Annotated[str, typer.Option(help="A device by name, or cpu: this machine, measured for ten seconds.")] = "cpu",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    price: Annotated[
        float | None, typer.Option(help="Dollars for an hour of one device; by default a list price.")
    ] = None,
    overrides: Set = None,
) -> None:
    """Predict whether a recipe fits, its speed, time and cost, and where the time goes."""
    checked = load(recipe, overridden(overrides))
    from craftor.devices import DEVICES

    if gpu not in ("cpu", *DEVICES):
        raise RecipeError(f"--gpu {gpu}: unknown; allowed: cpu, {', '.join(DEVICES)}")
    check(checked, recipe)
    from craftor import calibrate, estimate

    work = estimate.count(checked)
    if gpu == "cpu":
        num_workers, found = checked.workers.most, calibrate.predict(checked, work)
    else:
        device, num_workers = DEVICES[gpu], nodes * gpus_per_node
        rate = device.dollars_per_hour if price is None else price
        found = estimate.predict(work, checked, device, num_workers, nodes, rate)
    for name, said in estimate.summary(checked, found, gpu, num_workers):
        print(f"{name:11s} {said}")
    raise typer.Exit(not found.fits)


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Prove from a run's ledger that its steps used every sample of an epoch exactly once, through all restarts."""
    from craftor.ledger import audit as prove

    found = prove(run)
    print(
        f"{found.steps} steps used {found.samples} samples: {found.epochs} epochs of {found.num_rows}, each sample "
        f"once, and {found.remainder} samples of the next; on {' then '.join(map(str, found.workers))} workers"
    )
