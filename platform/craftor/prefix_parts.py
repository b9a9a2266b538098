"""The parts of a prefix cache: `part-000000.parquet` and so on, each of whole optimiser steps, filled by actors."""

from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet

from craftor.prefix import PrefixActor
from craftor.recipe import Recipe
from craftor.stage import ReadShare, opened
from craftor.stream import slots


def part_name(part: int) -> str:
    return f"part-{part:06d}.parquet"


def missing(manifest: dict[str, Any], url: str) -> list[int]:
    """Parts that are not there, or are shorter than they should be: such a one was the last before the cache grew."""
    filesystem, folder = fsspec.core.url_to_fs(url)
    num_steps, steps_per_part = manifest["num_steps"], manifest["steps_per_part"]
    found = []
    for part, first in enumerate(range(0, num_steps, steps_per_part)):
        path, num_samples = f"{folder}/{part_name(part)}", 0
        if filesystem.exists(path):
            with filesystem.open(path) as file:
                num_samples = pyarrow.parquet.read_metadata(file).num_rows
        if num_samples < min(steps_per_part, num_steps - first) * manifest["batch_size"]:
            found.append(part)
    return found


class Fill:
    """An actor: a part's number -> its file in each cache, in batches of one worker's share."""

    def __init__(
        self, recipe: dict[str, Any], rows: str, num_rows: int, urls: dict[int, str], steps_per_part: int
    ) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.prefix = PrefixActor(recipe)
        self.rows, self.num_rows, self.urls, self.steps_per_part = rows, num_rows, urls, steps_per_part

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (part,) = (int(p) for p in batch["part"])
        run, num_workers = self.recipe.run, self.recipe.workers.most
        reader = ReadShare(self.rows, self.num_rows, run.batch_size, 0, run.batch_size, 0)
        columns: dict[int, list[dict[str, np.ndarray]]] = {stop: [] for stop in self.urls}
        for step in range(part * self.steps_per_part, min((part + 1) * self.steps_per_part, run.num_steps)):
            # Each share of a step is a batch of its own, as the workers will read it.
            for rank in range(num_workers):
                own = slots(run.batch_size, rank, num_workers)
                first = step * run.batch_size
                rows = opened(reader.read(range(first + own.start, first + own.stop)))
                found = self.prefix.passing({**rows.columns, "position": np.array(rows.position)}, list(self.urls))
                for stop, rows_there in found.items():
                    columns[stop].append(rows_there)
        for stop, url in self.urls.items():
            _write_part(url, part, columns[stop])
        return batch


def _write_part(url: str, part: int, columns: list[dict[str, np.ndarray]]) -> None:
    table = pyarrow.table({name: list(np.concatenate([c[name] for c in columns])) for name in columns[0]})
    table = table.set_column(table.column_names.index("index"), "index", table["position"])
    filesystem, folder = fsspec.core.url_to_fs(url)
    temporary = f"{folder}/.writing-{part_name(part)}"
    with filesystem.open(temporary, "wb") as file:
        pyarrow.parquet.write_table(table.drop_columns(["position"]), file, row_group_size=256)
    filesystem.mv(temporary, f"{folder}/{part_name(part)}")
