"""`craftor evaluate | compare | votes | claims`: what a tuned encoder is worth, against base, rivals and claims."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()


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
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps of the reference; others take as many as cost the same.")
    ] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds.")] = 3,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts.")] = 96,
    workers: Annotated[int, typer.Option(min=1, help="Training workers and evaluation actors.")] = 2,
    model: Annotated[str | None, typer.Option(help="Another pipeline than the recipe's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Another model's recipe, with its rewards.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Image-caption pairs, for direct fine-tuning.")] = None,
) -> None:
    """Test the papers' claims: train every method at equal compute, compare, and say which hold."""
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
