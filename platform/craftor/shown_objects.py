"""Which samples of reward tuning see an object, and which: by their positions, so that it is the same in every run.

What they are shown can also be what their pictures are scored by: identity as one reward among the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from craftor import object_adapter, seeds
from craftor.customize import load
from craftor.denoise import Prompt
from craftor.diffuser import Diffuser
from craftor.locate import locate
from craftor.object_settings import ShownObject
from craftor.prefix_cache import weights_digest
from craftor_rewards.features import build_features, identity

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
        self.likeness = Likeness(settings.identity.weights) if settings.identity is not None else None

    def __call__(self, position: Sequence[int]) -> Float[Tensor, "b 1 *tokens d"]:
        references, on = self.shown_to(position)
        seen = self.encoder(references)
        return object_adapter.zero(seen, on.to(seen.device))

    def shown_to(self, position: Sequence[int]) -> tuple[Float[Tensor, "b 3 size size"], Bool[Tensor, " b"]]:
        """Each sample's reference, and whether it is shown."""
        chosen = (seeds.uniform(self.seed, position, "shown object") * len(self.references)).long()
        return self.references[chosen].float() / 255, seeds.uniform(self.seed, position, "object is shown") < self.share

    def beside(self, prompts: Sequence[Prompt], position: Sequence[int]) -> list[Prompt]:
        """The same with their objects; the branch of guidance that sees no text sees no object either.

        Pictures that are scored from here on are compared with these objects.
        """
        if self.likeness is not None:
            self.likeness.compare_with(*self.shown_to(position))
        seen = self(position)
        absent = torch.zeros_like(seen[:1])
        return [Prompt(replace(p.condition, image=seen), replace(p.null, image=absent)) for p in prompts]


class Likeness(nn.Module):
    """Cosine of what a frozen CLIP or DINO sees in a picture and in the object it was made with; 0 without an object.

    The object is cut out and the picture is not, so 1 is out of reach: what counts is that it rises. A picture that is
    nothing but the object scores highest, which is what the CLIP term with the prompt is there against.
    """

    differentiable, needs_prompt = True, False

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.features = build_features(locate(weights))
        self.wanted, self.on = torch.empty(0), torch.empty(0, dtype=torch.bool)

    @torch.no_grad()
    def compare_with(self, references: Float[Tensor, "b 3 size size"], on: Bool[Tensor, " b"]) -> None:
        """What the next pictures are compared with, and which of them are."""
        device = next(self.features.parameters()).device
        self.wanted, self.on = self.features(references.to(device)), on.to(device)

    def forward(self, images: Float[Tensor, "n 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Pictures of the objects' samples in their order, perhaps several times over (DRaFT-LV's copies)."""
        sample = torch.arange(len(images), device=self.on.device) % len(self.on)
        return torch.where(self.on[sample], identity(self.features(images), self.wanted[sample]), 0.0)


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
