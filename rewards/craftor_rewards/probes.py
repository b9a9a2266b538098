"""A few drawn images with prompts, and what each reward must say of them: a wrong environment cannot silently train.

Another resize, another tokenizer, a lost mean, a detached gradient or half precision where there was none change these
numbers by more than their tolerance. `golden.json` beside this file holds the recorded values. The images are computed
in integers, so they are the same bits on every machine.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from craftor_rewards.loading import sha256
from craftor_rewards.protocol import Reward, check_scores

GOLDEN = Path(__file__).with_name("golden.json")
SCORE_TOLERANCE = 2e-4
"""Of a score, relative where it is larger than 1: float32 on another processor differs by some 1e-5 of it."""
GRADIENT_TOLERANCE = 0.005
"""Relative, of a gradient's norm."""


@dataclass(frozen=True)
class Reading:
    """One number of one probe: as recorded and as it is here."""

    probe: str
    what: str
    expected: float
    got: float
    is_equal: bool


def probe_images() -> dict[str, tuple[Float[Tensor, "1 3 H W"], str]]:
    """Name -> image in [0, 1] and its prompt: square, landscape and portrait; smooth, edged, fine and noisy.

    The portrait leaves half a pixel of margin to towers of 64 and 224 pixels, on which the two ways to crop differ.
    """
    return {
        "disc": (_disc(256, 256), "a red circle on a white background"),
        "stripes": (_stripes(192, 288), "a photo of black and white stripes beside a blue square"),
        "texture": (_texture(329, 240), "a detailed colourful texture, close-up, high quality"),
        "noise": (_noise(224, 224), "grey noise"),
    }


def measure(reward: Reward, name: str) -> dict[str, dict[str, float]]:
    """Probe -> `score`, and `gradient`, the norm of d score / d image, where the reward is differentiable.

    Raises ValueError when a score is not one finite number, or has no gradient against the reward's own word.
    """
    device = next(reward.parameters(), torch.empty(0)).device if isinstance(reward, nn.Module) else torch.device("cpu")
    readings: dict[str, dict[str, float]] = {}
    for probe, (image, prompt) in probe_images().items():
        image = image.to(device).requires_grad_(reward.differentiable)
        score = reward(image, [prompt])
        check_scores(score, 1, name)
        readings[probe] = {"score": score.item()}
        if reward.differentiable:
            if not score.requires_grad:
                raise ValueError(f"reward '{name}' says it is differentiable, but its score has no gradient")
            (gradient,) = torch.autograd.grad(score.sum(), image)
            readings[probe]["gradient"] = gradient.norm().item()
    return readings


def compare(expected: dict[str, dict[str, float]], got: dict[str, dict[str, float]]) -> list[Reading]:
    """Every recorded number beside the one measured here; a number that is missing here is NaN, and not equal."""
    rows = []
    for probe, values in expected.items():
        for what, value in values.items():
            here = got.get(probe, {}).get(what, float("nan"))
            tolerance = GRADIENT_TOLERANCE * value if what == "gradient" else SCORE_TOLERANCE * max(1.0, abs(value))
            rows.append(Reading(probe, what, value, here, abs(here - value) <= tolerance))
    return rows


def fingerprint(weights: Path) -> dict[str, str]:
    """File name -> SHA-256 of what a folder, or a file, holds in the way of weights."""
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    files = [weights] if weights.is_file() else sorted(f for pattern in patterns for f in weights.glob(pattern))
    return {file.name: sha256(file) for file in files}


def load_golden(path: Path = GOLDEN) -> dict[str, dict[str, Any]]:
    """`<kind> <weights>` -> what `record` wrote; empty where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def record(name: str, readings: dict[str, dict[str, float]], files: dict[str, str], path: Path = GOLDEN) -> None:
    """Keep these readings as what this reward must say from now on. Only on a machine whose environment is trusted.

    name: `<kind> <weights>`; files: `fingerprint` of the weights.
    """
    golden = load_golden(path)
    golden[name] = {
        "weights": files,
        "probes": readings,
        "recorded_with": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    path.write_text(json.dumps(dict(sorted(golden.items())), indent=2) + "\n")


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return y, x


def _image(red: Tensor, green: Tensor, blue: Tensor) -> Float[Tensor, "1 3 H W"]:
    return torch.stack([red, green, blue]).clamp(0, 255)[None].float() / 255


def _disc(height: int, width: int) -> Tensor:
    y, x = _grid(height, width)
    inside = (y - height // 2) ** 2 + (x - width // 2) ** 2 < (height // 3) ** 2
    shade = 255 - (x + y) * 60 // (height + width)
    return _image(torch.where(inside, 220, shade), torch.where(inside, 30, shade), torch.where(inside, 25, shade))


def _stripes(height: int, width: int) -> Tensor:
    """Saturated black and white of growing width, where a filter overshoots, and a coloured square."""
    y, x = _grid(height, width)
    stripes = (x // (1 + 4 * (6 * y // height)) % 2) * 255
    square = (x > 2 * width // 3) & (y > height // 4) & (y < 3 * height // 4)
    return _image(torch.where(square, 20, stripes), torch.where(square, 60, stripes), torch.where(square, 230, stripes))


def _texture(height: int, width: int) -> Tensor:
    y, x = _grid(height, width)
    return _image(x * x // 37 % 256, (x * y // 19 + 2 * y) % 256, (y * y // 53 + 3 * x) % 256)


def _noise(height: int, width: int) -> Tensor:
    """Grey values from a multiplicative hash of the position."""
    y, x = _grid(height, width)
    mixed = (x * 374_761_393 + y * 668_265_263) % (1 << 31)
    mixed = (mixed ^ (mixed >> 13)) * 1_274_126_177 % (1 << 31)
    grey = (mixed >> 15) % 256
    return _image(grey, grey, grey)
