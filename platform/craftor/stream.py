"""Parquet rows in a fixed order -> each worker's share of every global batch, from any step on.

Position p = epoch * num_rows + index runs over the whole job; optimiser step s owns positions [s*B, (s+1)*B) and worker
r of W its r-th slice. So what a step trains on depends on the recipe alone, not on workers, read order or restarts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray.data


@dataclass(frozen=True)
class Rows:
    """One worker's slice of one global batch; `position` is the sample index all randomness derives from."""

    position: list[int]
    columns: dict[str, np.ndarray]


def read(folder: Path) -> ray.data.Dataset:
    """The prepared rows, in order of their `index` column."""
    return ray.data.read_parquet(sorted(str(path) for path in folder.glob("*.parquet")))


def batches(
    shard: ray.data.DataIterator, *, num_rows: int, batch_size: int, rank: int, world_size: int, start_step: int
) -> Iterator[Rows]:
    """Endless slices for worker `rank`, starting with step `start_step`; `batch_size` is the global one."""
    share = batch_size // world_size
    low, high = rank * share, (rank + 1) * share
    epoch, first = divmod(start_step * batch_size, num_rows)
    pending: list[tuple[int, dict[str, np.ndarray]]] = []
    while True:
        expected = 0
        for block in shard.iter_batches(batch_size=256, batch_format="numpy", prefetch_batches=1):
            index = block["index"]
            if index[0] != expected or (np.diff(index) != 1).any():
                raise RuntimeError(f"rows arrived out of order: index {index[0]} where {expected} was due")
            expected += len(index)
            positions = epoch * num_rows + index
            slot = positions % batch_size
            for row in np.flatnonzero((index >= first) & (slot >= low) & (slot < high)):
                pending.append((int(positions[row]), {name: column[row] for name, column in block.items()}))
                if len(pending) == share:
                    yield _join(pending)
                    pending = []
        if expected != num_rows:
            raise RuntimeError(f"read {expected} rows where {num_rows} were prepared")
        epoch, first = epoch + 1, 0


def _join(rows: list[tuple[int, dict[str, np.ndarray]]]) -> Rows:
    names = rows[0][1]
    return Rows([position for position, _ in rows], {name: np.stack([row[name] for _, row in rows]) for name in names})
