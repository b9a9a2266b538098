"""A head on CLIP's image embedding that predicts people's rating of an image, whatever its prompt (LAION aesthetics).

A head's folder holds `head.safetensors`, `head.json` and its CLIP, or where that is:
`{"clip": "clip", "widths": [768, 1024, 128, 64, 16, 1], "activation": "identity"}`. `clip` is a folder relative to
the head's own ("../reward_clip" shares another reward's), a repository or a name of the catalogue; `widths` start with
the embedding's. LAION's public heads are one .pth file each and belong to OpenAI's ViT-L/14.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from craftor_rewards.catalogue import CATALOGUE
from craftor_rewards.clip import ClipTowers
from craftor_rewards.loading import find, load_tensors
from craftor_rewards.preprocess import Fit
from craftor_rewards.protocol import Range, check_inputs

ACTIVATIONS = {"identity": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}
_LINEAR_HEAD = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
"""LAION's v2 head: linear layers, dropout between them, no activation. Its relative with ReLUs has other numbers."""


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
    """The rating in the units it was trained on, 1 to 10; nothing in a head keeps it there."""

    differentiable = True
    needs_prompt = False
    fit: Fit = "crop_torchvision"
    score_range: Range = "unbounded; rated 1 to 10"

    def __init__(
        self,
        weights: str | Path,
        *,
        clip: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = False,
    ) -> None:
        """`clip` replaces the CLIP that a head's folder names, or ViT-L/14 for a .pth file."""
        super().__init__()
        if CATALOGUE.get(str(weights)) or Path(weights).is_file():
            self.head = collapse(load_tensors(find(weights)))
            clip = clip or "clip-vit-l-14"
        else:
            self.head, of_head = _head_of_folder(Path(weights))
            clip = clip or of_head
        self.towers = ClipTowers(clip, dtype=dtype, checkpoint=checkpoint, text=False, fit=self.fit)
        self.input_size = self.towers.image_size
        takes = self.head.settings["widths"][0]
        if takes != self.towers.width:
            raise ValueError(f"head in '{weights}' takes {takes} features; its CLIP '{clip}' gives {self.towers.width}")
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts, needs_prompt=False)
        return self.head(self.towers.image_features(images))


def collapse(state: Mapping[str, Tensor]) -> Head:
    """LAION's linear layers as the one they are: score = w . e + b for a unit embedding e.

    With W_1 .. W_n and b_1 .. b_n the layers of the file, w = W_n ... W_1 and b = b_n + W_n (b_{n-1} + ...), multiplied
    in float64. A file that is one layer already ("weight", "bias": LAION's v1) is taken as it is. Raises ValueError for
    a file with other layers: with activations between them no such w exists.
    """
    if set(state) == {"weight", "bias"}:
        layers = [""]
    elif set(state) == {f"{layer}.{kind}" for layer in _LINEAR_HEAD for kind in ("weight", "bias")}:
        layers = [f"{layer}." for layer in _LINEAR_HEAD]
    else:
        raise ValueError(
            f"head has tensors {', '.join(sorted(state))}; expected weight and bias of {', '.join(_LINEAR_HEAD)} "
            "(linear, without activations), or of one layer"
        )
    weight, bias = (state[f"{layers[0]}{kind}"].double() for kind in ("weight", "bias"))
    for layer in layers[1:]:
        matrix = state[f"{layer}weight"].double()
        weight, bias = matrix @ weight, matrix @ bias + state[f"{layer}bias"].double()
    head = Head([weight.shape[1], 1], "identity")
    head.load_state_dict({"layers.0.weight": weight.float(), "layers.0.bias": bias.float()})
    return head


def _head_of_folder(folder: Path) -> tuple[Head, str | Path]:
    """The head and where its CLIP is."""
    if not (folder / "head.json").is_file():
        raise FileNotFoundError(
            f"no aesthetic head in '{folder}': expected head.json, head.safetensors and the CLIP that head.json names, "
            "or a .pth file of LAION's; `craftor rewards fetch laion-aesthetic-v2` fetches the public one, and "
            f"`hf download OWNER/NAME --local-dir {folder / 'clip'}` a public CLIP"
        )
    settings = json.loads((folder / "head.json").read_text())
    clip = settings.pop("clip")
    head = Head(**settings)
    stored = load_file(folder / "head.safetensors")
    head.load_state_dict({name: tensor.to(torch.float32) for name, tensor in stored.items()})
    is_public = clip in CATALOGUE or ("/" in clip and not clip.startswith("."))
    return head, clip if is_public and not (folder / clip).is_dir() else folder / clip
