"""Parquet rows in a fixed order -> each worker's share of every global batch, from any step on.

Position p = epoch * num_rows + index runs over the whole job; optimiser step s owns positions [s*B, (s+1)*B) and worker
r of W its r-th slice, the slots [r*B//W, (r+1)*B//W). So what a step trains on depends on the recipe alone, not on
workers, read order or restarts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import ray.data
import torch
from torch import Tensor

from craftor.storage import retried

IDS = "input_ids"
"""Column of the first encoder's token ids; the second's is `input_ids_2`."""


@dataclass(frozen=True)
class Rows:
    """One worker's slice of one global batch; `position` is the sample index all randomness derives from."""

    position: list[int]
    columns: dict[str, np.ndarray]

    def ids(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Token ids by the encoder that reads them."""
        found = {name: column for name, column in self.columns.items() if name.startswith(IDS)}
        return {
            name.replace(IDS, "text_encoder"): torch.from_numpy(ids).long().to(device) for name, ids in found.items()
        }

    def split(self, size: int | None) -> "Iterator[Rows]":
        """Parts of at most `size` samples, in order."""
        for start in range(0, len(self.position), size or len(self.position)):
            part = slice(start, start + (size or len(self.position)))
            yield Rows(self.position[part], {name: column[part] for name, column in self.columns.items()})


def slots(batch_size: int, rank: int, world_size: int) -> range:
    """A worker's part of every global batch; the workers' sizes differ by one at most."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def read(folder: Path | str) -> ray.data.Dataset:
    """The prepared rows of a folder or fsspec URL, in order of their `index` column.

    Reading asks for no CPU: elastic workers take every one there is, and would wait for their rows for ever. A file is
    a block: cut up for parallel work, each part would keep one more process awake beside the workers.
    """
    filesystem, path = fsspec.core.url_to_fs(str(folder))
    local = filesystem.protocol in ("file", ("file", "local"))
    paths = sorted(retried(lambda: filesystem.glob(f"{path}/*.parquet")))
    context = ray.data.DataContext.get_current()
    newer, context.use_datasource_v2 = context.use_datasource_v2, False  # it lists files on a CPU, whatever one says
    try:
        how = {"num_cpus": 0, "override_num_blocks": max(1, len(paths))}
        return ray.data.read_parquet(paths, filesystem=None if local else filesystem, **how)
    finally:
        context.use_datasource_v2 = newer


def batches(
    shard: ray.data.DataIterator, *, num_rows: int, batch_size: int, rank: int, world_size: int, start_step: int
) -> Iterator[Rows]:
    """Endless slices for worker `rank`, starting with step `start_step`; `batch_size` is the global one."""
    own = slots(batch_size, rank, world_size)
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
            for row in np.flatnonzero((index >= first) & (slot >= own.start) & (slot < own.stop)):
                pending.append((int(positions[row]), {name: column[row] for name, column in block.items()}))
                if len(pending) == len(own):
                    yield _join(pending)
                    pending = []
        if expected != num_rows:
            raise RuntimeError(f"read {expected} rows where {num_rows} were prepared")
        epoch, first = epoch + 1, 0


def _join(rows: list[tuple[int, dict[str, np.ndarray]]]) -> Rows:
    names = rows[0][1]
    return Rows([position for position, _ in rows], {name: np.stack([row[name] for _, row in rows]) for name in names})
