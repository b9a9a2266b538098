"""The prefix as a Ray Data pipeline of each training worker: optimiser steps -> its shares of rows -> their prefixes.

Actors compute ahead of the trainer, as far as Ray Data's backpressure lets them, and can sit on other, cheaper devices.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet
import ray.data

from craftor.prefix import PrefixActor
from craftor.recipe import Recipe, RewardTuning
from craftor.stream import Rows, slots


def batches(
    recipe: Recipe, rows: Path | str, *, num_rows: int, rank: int, world_size: int, start_step: int
) -> Iterator[Rows]:
    """Worker `rank`'s slices from step `start_step` to the recipe's last, with the prefix of each sample."""
    assert isinstance(recipe.task, RewardTuning)
    settings, num_steps = recipe.task.prefix, recipe.run.num_steps - start_step
    if num_steps <= 0:
        return
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    own = slots(recipe.run.batch_size, rank, world_size)
    steps = ray.data.range(num_steps, override_num_blocks=num_steps)
    read = steps.map_batches(
        ReadShare,
        fn_constructor_args=(str(rows), num_rows, recipe.run.batch_size, own.start, len(own), start_step),
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=1,
        num_cpus=0.1,
    )
    staged = read.map_batches(
        Prefix,
        fn_constructor_args=(recipe.model_dump(by_alias=True),),
        compute=ray.data.ActorPoolStrategy(size=settings.actors),
        batch_size=1,
        num_cpus=0 if settings.gpus_per_actor else 1,
        num_gpus=settings.gpus_per_actor,
    )
    for batch in staged.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=2):
        yield opened(batch)


class ReadShare:
    """An actor: an optimiser step's number -> one row that holds a worker's whole share of that step's batch."""

    def __init__(self, folder: str, num_rows: int, batch_size: int, offset: int, share: int, start_step: int) -> None:
        self.filesystem, path = fsspec.core.url_to_fs(folder)
        self.files = sorted(self.filesystem.glob(f"{path}/*.parquet"))
        self.num_rows, self.batch_size, self.offset, self.share = num_rows, batch_size, offset, share
        self.start_step = start_step
        self.next_index = 0
        self.reader: Iterator[dict[str, Any]] = iter(())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        first = (int(batch["id"][0]) + self.start_step) * self.batch_size + self.offset
        return self.read(range(first, first + self.share))

    def read(self, positions: range) -> dict[str, np.ndarray]:
        """The rows at some positions of the whole job, as one row."""
        return closed([{**self._row(position % self.num_rows), "position": position} for position in positions])

    def _row(self, index: int) -> dict[str, Any]:
        """Rows are asked for in order, so reading on is nearly always enough; else begin again."""
        if index < self.next_index or self.next_index == 0:
            self.next_index, self.reader = 0, self._read()
        row = next(itertools.islice(self.reader, index - self.next_index, None))
        assert row["index"] == index, f"row {row['index']} where {index} was due"
        self.next_index = index + 1
        return row

    def _read(self) -> Iterator[dict[str, Any]]:
        for path in self.files:
            with self.filesystem.open(path) as file:
                for block in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                    yield from block.to_pylist()


class Prefix:
    """`PrefixActor` on rows that hold a whole share each."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.actor = PrefixActor(recipe)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = opened(batch)
        columns = self.actor({**rows.columns, "position": np.array(rows.position)})
        return {**{name: column[None] for name, column in columns.items()}, "prompt": batch["prompt"]}


def closed(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """A share of rows as one row whose values are arrays over the share."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: np.array([json.dumps(values)], dtype=object) if isinstance(values[0], str) else np.array(values)[None]
        for name, values in columns.items()
    }


def opened(batch: dict[str, np.ndarray]) -> Rows:
    """The share of rows that a batch of one row holds."""
    columns = {
        name: np.array(json.loads(column[0]), dtype=object) if isinstance(column[0], str) else np.asarray(column[0])
        for name, column in batch.items()
    }
    position = [int(p) for p in columns.pop("position")]
    return Rows(position, columns)
