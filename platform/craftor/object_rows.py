"""Rows that an object encoder trains on: whether every batch will hold its share of rows with an object."""

from pathlib import Path

import numpy as np
import pyarrow.parquet

from craftor.recipe import ObjectEncoder, Recipe, RecipeError

COLUMNS = ("index", "prompt", "input_ids", "latents", "domain", "mask", "reference")


def check_mixture(recipe: Recipe, source: Path) -> None:
    """Raise RecipeError where a column is missing, or where some batch's share of domain rows is not the recipe's.

    Batches run on from the last row to the first, so all that a run can meet are looked at.
    """
    assert isinstance(recipe.task, ObjectEncoder)
    folder, size = Path(recipe.data.path), recipe.run.batch_size
    where = f"{source}: data.path = {str(folder)!r}"
    parts = []
    for path in sorted(folder.glob("*.parquet")):
        file = pyarrow.parquet.ParquetFile(path)
        if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise RecipeError(f"{where}: {path.name} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
        parts.append(file.read(columns=["domain"])["domain"].to_numpy())
    domain = np.concatenate(parts)
    expected = round(recipe.task.domain_share * size)
    # Every window that a batch can be, wherever an epoch begins in it.
    ends = np.concatenate([[0], np.cumsum(np.resize(domain, len(domain) + size))])
    starts = np.arange(0, len(domain), np.gcd(len(domain), size))
    found = ends[starts + size] - ends[starts]
    if (wrong := np.flatnonzero(found != expected)).size:
        first = int(starts[wrong[0]])
        raise RecipeError(
            f"{where}: the batch from row {first} has {int(found[wrong[0]])} rows with an object of {size}, but "
            f"task.domain_share = {recipe.task.domain_share} asks for {expected}"
        )
