"""`craftor`: parse and validate first, import what is heavy afterwards."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from craftor import __version__
from craftor.object_data_command import app as objects_app
from craftor.preflight import check
from craftor.recipe import RecipeError, load, load_run, parse_override
from craftor.registry_command import app as registry_app
from craftor.rewards_command import app as rewards_app

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Make text-to-image diffusion models better by reward."
)
app.add_typer(rewards_app, name="rewards")
app.add_typer(registry_app)
app.add_typer(objects_app, name="objects")
console = Console(stderr=True)

Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: --set optimizer.lr=1e-4")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; by default runs/<recipe name>")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def quickstart(out: Out = None, overrides: Set = None) -> None:
    """Train, register, evaluate and report on the embedded micro model: the whole idea in minutes."""
    from craftor.console import table
    from craftor.quickstart import quickstart as run

    folder = out or Path("runs/quickstart")
    report = run(folder, _overrides(overrides))
    Console().print(table(report["metrics"]))
    for name in ("report.html", "report.png", "report.json", "bundle"):
        print(folder / name)
    if registered := report["registered"]:
        print(f"registered in MLflow: models:/{registered['name']}/{registered['version']}")


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
            get_run(resume.rstrip("/"), folder)
        trained = go_on(folder, load(recipe, _overrides(overrides)) if recipe else None, accept)
    else:
        assert recipe is not None
        checked = load(recipe, _overrides(overrides))
        check(checked, recipe)  # before the imports below, which take seconds
        from craftor.job import train as start

        trained = start(checked, recipe, out or Path("runs") / checked.name)
    print(trained.checkpoint)
    if trained.registered:
        print(f"registered in MLflow: models:/{trained.registered['name']}/{trained.registered['version']}")


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
        checked = load(recipe, _overrides(overrides))
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
        checked = load(recipe, _overrides(overrides))
        check(checked, recipe)
        from craftor.searching.mix import search_mix as start

        mixed = start(checked, recipe, encoders, out or Path("runs") / f"{checked.name}-mix")
    for page in mixed.pages:
        print(page)


@app.command()
def prefix(
    recipe: Annotated[Path, typer.Argument(help="A reward-tuning recipe.")],
    out: Annotated[str, typer.Option("--out", help="A folder or fsspec URL for the cache.")],
    workers: Annotated[int, typer.Option(help="Actors.")] = 2,
    overrides: Set = None,
) -> None:
    """Compute the denoising steps before the window once, for every run that shares them; goes on where it stopped."""
    checked = load(recipe, _overrides(overrides))
    check(checked, recipe)
    from craftor.inputs import fill_prefix_cache

    print(f"{fill_prefix_cache(checked, recipe, out, workers)} samples in {out}")
    print(f'use it with: --set task.prefix=\'{{mode = "cache", cache = "{out}"}}\'')


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="One run folder, or several whose encoders are mixed.")],
    out: Annotated[Path | None, typer.Option("--out", help="By default RUN/evaluation.")] = None,
    workers: Annotated[int, typer.Option(help="Evaluation actors.")] = 2,
    suite: Annotated[str | None, typer.Option(help="parti, hpsv2, drawbench, geneval, … instead of held_out.")] = None,
    prompts: Annotated[str | None, typer.Option(help="The suite's file, folder, URL or hub dataset.")] = None,
    category: Annotated[str | None, typer.Option(help="Of the suite, alone.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="So many of the prompts.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Images a prompt; by default the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise; by default the recipe's.")] = None,
    keep: Annotated[int, typer.Option(min=0, help="So many prompts keep their pictures.")] = 16,
    paper: Annotated[bool, typer.Option("--paper", help="Also score as TextCraftor's code did.")] = False,
) -> None:
    """Score base and tuned with the same noise: paired differences and intervals. Goes on where it was interrupted."""
    from craftor.console import breakdown_table, table
    from craftor.evaluate import Asked
    from craftor.quickstart import evaluate_runs, record

    folder = out or runs[0] / (f"evaluation-{suite}" if suite else "evaluation")
    asked = Asked(suite, prompts, category, limit, seeds, seed, keep, paper)
    summary = evaluate_runs(runs, folder, workers, asked)
    Console().print(table(summary["metrics"]))
    for name, metrics in summary.get("methods", {}).items():
        Console().print(f"{name}, against the base", table(metrics))
    if suite:
        Console().print(breakdown_table(summary["categories"]))
    print(folder / "summary.json")
    if len(runs) == 1 and asked == Asked():
        record(runs[0], summary["metrics"])


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated runs, or evaluations' own folders.")],
    out: Annotated[Path, typer.Option("--out", help="A folder.")] = Path("runs/compare"),
) -> None:
    """Compare evaluated runs of one base: tables, contact sheets, and a page on which people vote blindly."""
    from craftor.comparison_page import write_comparison

    paths = write_comparison(runs, out)
    print((out / "compare.md").read_text())
    for path in paths:
        print(path)


@app.command()
def votes(
    files: Annotated[list[Path], typer.Argument(help="What the blind page saved, of one person or several.")],
) -> None:
    """Win rates and their intervals, from the votes on a comparison's blind page."""
    from craftor.blind import load_votes, tally

    for row in tally(load_votes(files)):
        low, high = row["ci95"]
        print(
            f"{row['of']} over {row['over']}: {row['win_rate']:.1%} [{low:.1%}, {high:.1%}], {row['num_votes']} votes "
            f"on {row['num_prompts']} prompts, {row['ties']} ties; left {row['left']}, right {row['right']}"
        )


@app.command()
def claims(
    out: Annotated[Path, typer.Option("--out", help="A folder; what is finished there is not done again.")] = Path(
        "runs/claims"
    ),
    only: Annotated[str | None, typer.Option(help="Some of them: C1,C7.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table's figures here.")] = None,
    as_markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Print the table of this file instead.")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say what each claim needs and takes.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of every method.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds.")] = 3,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts.")] = 96,
    workers: Annotated[int, typer.Option(min=1, help="Training workers and evaluation actors.")] = 2,
    model: Annotated[str | None, typer.Option(help="Another pipeline than the recipe's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Another model's recipe, with its rewards.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Image-caption pairs, for direct fine-tuning.")] = None,
) -> None:
    """Test the papers' claims: train every method at equal samples, compare, and say which hold."""
    if as_markdown is not None:
        from craftor.claims.table import markdown

        print(markdown(json.loads(as_markdown.read_text())))
        return
    from craftor.claims import table, testing
    from craftor.claims.methods import REFERENCE, Budget
    from craftor.run_files import write_json

    chosen = testing.select(only.split(",") if only else None)
    budget = Budget(
        steps, batch, seeds, prompts, workers=workers, model=model, reference=recipe or REFERENCE, pairs=pairs
    )
    if plan_only:
        for row in table.costs(chosen, budget):
            alone, more = (row[key] / 60 for key in ("seconds", "more"))
            print(f"{row['id']:4} {alone:6.1f} min, {more:5.1f} of them new: {', '.join(row['methods'])}")
        return
    found = testing.test(chosen, budget, out)
    for path in filter(None, (out / "claims.json", json_file)):
        write_json(path, found)
    print(table.markdown(found))
    print(out / "claims.json")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder with a report.json.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table for a README instead.")] = False,
) -> None:
    """Draw report.html and report.png again from a run's report.json."""
    if as_markdown:
        from craftor.verdict import markdown

        print(markdown(json.loads((run / "report.json").read_text())))
        return
    from craftor.report import write_report

    for path in write_report(run):
        print(path)


@app.command()
def customize(
    image: Annotated[Path, typer.Option(help="A picture of the object; its transparency is its mask.")],
    prompt: Annotated[str, typer.Option(help="The scene to put it in.")],
    mask: Annotated[Path | None, typer.Option(help="Where the object is: white, or opaque.")] = None,
    encoder: Annotated[str, typer.Option(help="An object encoder: a run, a bundle, or models:/NAME@ALIAS.")] = (
        "runs/micro-object-encoder"
    ),
    out: Annotated[Path, typer.Option(help="The picture, or a sheet of several.")] = Path("customized.png"),
    num: Annotated[int, typer.Option(min=1, help="Pictures to make.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    text_weight: Annotated[float, typer.Option(min=0, help="Guidance by the prompt.")] = 4.0,
    object_weight: Annotated[float, typer.Option(min=0, help="Guidance by the object.")] = 4.0,
    object_from: Annotated[int, typer.Option(min=0, help="First denoising step that sees the object.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    mix: Annotated[
        list[str] | None, typer.Option(help="A tuned text encoder and its weight: models:/NAME@ALIAS=0.5; or several.")
    ] = None,
) -> None:
    """Put the object of one picture into new ones, in one pass of its encoder."""
    for path in (image, *([mask] if mask else [])):
        if not path.is_file():
            raise RecipeError(f"{path}: no such file")
    mixture = dict(_weighted(text) for text in mix or [])
    from craftor.customize import Guidance, customize_file

    guidance = Guidance(steps, text_weight, object_weight, object_from)
    print(customize_file(image, mask, prompt, encoder, out, num, seed, guidance, mixture))


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
    from craftor.serving.deployment import serve_for_ever

    serve_for_ever(settings)


@app.command()
def sync(run: Annotated[Path, typer.Argument(help="A run folder whose MLflow server was away.")]) -> None:
    """Send metrics to MLflow that an outage held back, and register the encoder if that is still due."""
    from craftor.job import sync as send

    print(send(run).registered)


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Prove from a run's ledger that its steps used every sample of an epoch exactly once, through all restarts."""
    from craftor.ledger import audit as prove

    found = prove(run)
    print(
        f"{found.steps} steps used {found.samples} samples: {found.epochs} epochs of {found.num_rows}, each sample "
        f"once, and {found.remainder} samples of the next; on {' then '.join(map(str, found.workers))} workers"
    )


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe whose weights, prompts and storage to look for.")
    ] = None,
    out: Out = None,
    overrides: Set = None,
) -> None:
    """Check the cluster of RAY_ADDRESS, or this machine: versions, GPUs, attention, storage, MLflow, weights, token."""
    checked = load(recipe, _overrides(overrides)) if recipe else None
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
    checked = load(recipe, _overrides(overrides))
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


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise RecipeError(f"--mix {text}: expected ENCODER=WEIGHT, for example models:/style@champion=0.5") from None


def _overrides(texts: list[str] | None) -> dict[str, Any]:
    return dict(parse_override(text) for text in texts or [])


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback; SIGTERM ends in 143."""
    # Read by these libraries when they are imported, later; `quiet` does the rest.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "MLFLOW_LOGGING_LEVEL"):
        os.environ.setdefault(name, "ERROR" if name.startswith("MLFLOW") else "error")
    try:
        app(standalone_mode=True)
    except RecipeError as error:
        _fail(error)
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.startswith("craftor"):
            _fail(error)
        raise


def _fail(error: Exception) -> None:
    console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    raise SystemExit(getattr(error, "exit_code", 2))
