"""The identity scorer: images in [0, 1] -> which object is in them, and whether two images show the same one.

A small convolutional classifier of an identity's attributes, trained on whole and cut-out renders of training
identities alone. Like the referee it shares nothing with any encoder or reward. It never saw a held-out identity, but
all of their parts; so it can name each, and does.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from craftor_micro.objects import IDENTITY, PATTERNS
from craftor_micro.referee import block
from craftor_micro.world import COLOURS, SHAPES

HEADS = dict(zip(IDENTITY, (len(SHAPES), len(COLOURS), len(COLOURS), len(PATTERNS)), strict=True))


class IdentityScorer(nn.Module):
    """Convolutions down to 4x4 cells, a hidden layer, and a linear one of a head for each attribute."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 96, 96), hidden: int = 128) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.settings = {"widths": list(widths), "hidden": hidden}
        self.features = nn.Sequential(
            *block(3, a, kernel=4, stride=2),  # 32x32
            *block(a, b, kernel=3, stride=2),  # 16x16
            *block(b, c, kernel=3, stride=1),
            *block(c, d, kernel=3, stride=2),  # 8x8
            *block(d, e, kernel=3, stride=2),  # 4x4
        )
        self.hidden = nn.Linear(e * 16, hidden)
        self.heads = nn.Linear(hidden, sum(HEADS.values()))

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> dict[str, Float[Tensor, "b _"]]:
        """Logits by attribute."""
        cells = self.features((images - 0.5) * 4).flatten(1)
        return dict(zip(HEADS, self.heads(F.relu(self.hidden(cells))).split(list(HEADS.values()), dim=1), strict=True))

    @staticmethod
    def load(folder: str | Path) -> "IdentityScorer":
        """Frozen, in float32, from `config.json` and `model.safetensors` (stored in half precision)."""
        folder = Path(folder)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"no identity scorer in '{folder}': expected config.json and model.safetensors; "
                f"make them with `python -m craftor_micro.build identity --out {folder}`"
            )
        scorer = IdentityScorer(**json.loads((folder / "config.json").read_text()))
        scorer.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return scorer.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings) + "\n")
        floats = {k: v for k, v in self.state_dict().items() if v.is_floating_point()}
        save_file({k: v.half().contiguous() for k, v in floats.items()}, folder / "model.safetensors")

    @torch.no_grad()
    def judge(
        self, images: Float[Tensor, "b 3 64 64"], attributes: dict[str, Int[Tensor, " b"]]
    ) -> dict[str, Float[Tensor, " b"]]:
        """Per image 1 or 0 for each attribute; `identity` is 1 where all are right, so that it is this object."""
        outputs = self(images)
        right = {name: (outputs[name].argmax(1) == attributes[name]).float() for name in IDENTITY}
        return {**right, "identity": torch.stack(list(right.values())).prod(0)}

    @torch.no_grad()
    def same(self, images: Float[Tensor, "b 3 64 64"], references: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, " b"]:
        """Log-probability that both show one identity: sum over attributes of log sum_k p_k(image) p_k(reference)."""
        first, second = self(images), self(references)
        agree = [
            torch.logsumexp(F.log_softmax(first[name], 1) + F.log_softmax(second[name], 1), 1) for name in IDENTITY
        ]
        return torch.stack(agree).sum(0)
