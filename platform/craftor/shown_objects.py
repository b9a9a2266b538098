"""Which samples of reward tuning see an object, and which: by their positions, so that it is the same in every run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from craftor import object_adapter, seeds
from craftor.customize import load
from craftor.denoise import Prompt
from craftor.diffuser import Diffuser
from craftor.prefix_cache import weights_digest
from craftor.task_settings import ShownObject

MOST = 4096
"""References that are kept in memory: the first ones."""


class ShownObjects:
    """Sample positions -> what the image encoder makes of their references; zeros, which mean none, for the rest."""

    def __init__(self, settings: ShownObject, seed: int, diffuser: Diffuser) -> None:
        customizer = load(settings.encoder, diffuser.device)
        if weights_digest([customizer.diffuser.text_encoder]) != weights_digest([diffuser.text_encoder]):
            raise ValueError(f"task.shown.encoder = {settings.encoder!r}: was made for another model than model.path")
        self.unet, self.encoder = customizer.unet, customizer.encoder
        self.share, self.seed = settings.share, seed
        self.references = read_references(Path(settings.references), self.encoder.size)

    def __call__(self, position: Sequence[int]) -> Float[Tensor, "b 1 *tokens d"]:
        chosen = (seeds.uniform(self.seed, position, "shown object") * len(self.references)).long()
        on = seeds.uniform(self.seed, position, "object is shown") < self.share
        seen = self.encoder(self.references[chosen].float() / 255)
        return object_adapter.zero(seen, on.to(seen.device))

    def beside(self, prompts: Sequence[Prompt], position: Sequence[int]) -> list[Prompt]:
        """The same with their objects; the branch of guidance that sees no text sees no object either."""
        seen = self(position)
        absent = torch.zeros_like(seen[:1])
        return [Prompt(replace(p.condition, image=seen), replace(p.null, image=absent)) for p in prompts]


def read_references(folder: Path, size: int) -> UInt8[Tensor, "n 3 size size"]:
    """Of rows with an object, as `craftor.tasks.object_encoder` has them. Raises ValueError where there are none."""
    found: list[np.ndarray] = []
    for path in sorted(folder.glob("*.parquet")):
        file = pyarrow.parquet.ParquetFile(path)
        if missing := {"domain", "reference"} - set(file.schema_arrow.names):
            raise ValueError(f"task.shown.references: {path} has no column {min(missing)!r}")
        for batch in file.iter_batches(batch_size=256, columns=["domain", "reference"]):
            found += [
                row
                for row, has in zip(batch["reference"].to_numpy(False), batch["domain"].to_pylist(), strict=True)
                if has
            ]
            if len(found) >= MOST:
                break
    if not found:
        raise ValueError(f"task.shown.references = '{folder}': no row with an object in it")
    if len(found[0]) != 3 * size * size:
        raise ValueError(
            f"task.shown.references = '{folder}': {len(found[0])} values each; the encoder sees 3x{size}x{size}"
        )
    return torch.from_numpy(np.stack(found[:MOST])).view(-1, 3, size, size)
