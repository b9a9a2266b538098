"""`craftor`: one command line; a user's mistake is one line, said before anything heavy is imported."""

import gc
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from craftor import __version__
from craftor.commands import cluster, encoder, evaluation, generation, objects, registry, rewards, search, training
from craftor.recipe import RecipeError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Make text-to-image diffusion models better by reward."
)
PANELS = {
    "Train": (training.app,),
    "Evaluate and compare": (evaluation.app,),
    "Search": (search.app,),
    "Registered encoders": (registry.app, encoder.app),
    "Images": (generation.app,),
    "Clusters": (cluster.app,),
}
"""Headings of `craftor --help`."""
for heading, parts in PANELS.items():
    for part in parts:
        for command in part.registered_commands:
            command.rich_help_panel = heading
        app.add_typer(part)
app.add_typer(rewards.app, name="rewards", rich_help_panel="Reward models")
app.add_typer(objects.app, name="objects", rich_help_panel="Images")
console = Console(stderr=True)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback; SIGTERM ends in 143."""
    # Read by these libraries when they are imported, later; `quiet` does the rest.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "MLFLOW_LOGGING_LEVEL"):
        os.environ.setdefault(name, "ERROR" if name.startswith("MLFLOW") else "error")
    gc.set_threshold(10_000)  # by default a fifth of the time of all that is imported later is the collector's
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
