"""A head on CLIP's image embedding that predicts people's rating of an image, whatever its prompt (LAION aesthetics).

A head's folder holds `head.safetensors`, `head.json` and its CLIP, or where that is:
`{"clip": "clip", "widths": [768, 1024, 128, 64, 16, 1], "activation": "identity"}`. `clip` is a folder relative to
the head's own ("../reward_clip" shares another reward's) or a repository; `widths` start with the embedding's.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from craftor_rewards.clip import ClipTowers
from craftor_rewards.protocol import check_inputs

ACTIVATIONS = {"identity": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}


class Head(nn.Module):
    """Linear layers with an activation between them; LAION's has none ("identity")."""

    def __init__(self, widths: Sequence[int], activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation '{activation}'; available: {', '.join(ACTIVATIONS)}")
        if widths[-1] != 1:
            raise ValueError(f"widths {list(widths)} end with {widths[-1]}; expected 1, the score")
        self.settings = {"widths": list(widths), "activation": activation}
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        *hidden, last = self.layers
        for layer in hidden:
            features = self.activation(layer(features))
        return last(features).squeeze(-1)

    def save(self, folder: str | Path, *, clip: str) -> None:
        """Half precision; `clip` is what `head.json` says of the CLIP below."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "head.json").write_text(json.dumps({"clip": clip, **self.settings}) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "head.safetensors")


class Aesthetic(nn.Module):
    """The rating in the units it was trained on, here 0 to 10."""

    differentiable = True
    needs_prompt = False

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        folder = Path(weights)
        if not (folder / "head.json").is_file():
            raise FileNotFoundError(
                f"no aesthetic head in '{folder}': expected head.json, head.safetensors and the CLIP that head.json "
                f"names; a public CLIP comes with `hf download OWNER/NAME --local-dir {folder / 'clip'}`"
            )
        settings = json.loads((folder / "head.json").read_text())
        clip = settings.pop("clip")
        is_local = (folder / clip).is_dir() or clip.startswith(".") or "/" not in clip
        self.towers = ClipTowers(folder / clip if is_local else clip)
        self.head = Head(**settings)
        if settings["widths"][0] != self.towers.width:
            raise ValueError(
                f"head in '{folder}' takes {settings['widths'][0]} features; "
                f"its CLIP '{clip}' gives {self.towers.width}"
            )
        stored = load_file(folder / "head.safetensors")
        self.head.load_state_dict({name: tensor.to(torch.float32) for name, tensor in stored.items()})
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts)
        return self.head(self.towers.image_features(images))
