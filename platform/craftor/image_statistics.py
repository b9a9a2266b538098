"""Images in [0, 1] -> figures that change when a reward is exploited, with no model: contrast, colours, variety.

After UniRL's canaries: a reward for legible text erased backgrounds (edges -60 %, colour entropy -54 %) while every
score rose. A checkerboard shows as edges, a collapse onto one picture as a loss of variety.
"""

import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from craftor.decode import saturated

THUMBNAIL, PROMPT = "thumbnail", "prompt"
"""Per-sample tensors that travel with the metrics so that variety is measured over the whole batch."""
_SIDE = 8
_LUMA = (0.299, 0.587, 0.114)
_DARK, _EDGE, _LEVELS = 0.1, 0.1, 8


@torch.no_grad()
def measure(images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Per image: `saturated`, `dark`, `edge_density`, `colour_entropy`, and what `summarise` needs for diversity."""
    # Numbers below 2**24 are exact in float32.
    numbers = [zlib.crc32(prompt.encode()) % 2**24 for prompt in prompts]
    return {
        "saturated": saturated(images),
        "dark": dark(images),
        "edge_density": edge_density(images),
        "colour_entropy": colour_entropy(images),
        THUMBNAIL: F.adaptive_avg_pool2d(images.float(), _SIDE).flatten(1),
        PROMPT: torch.tensor(numbers, dtype=torch.float32, device=images.device),
    }


def summarise(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The whole batch's metrics -> means, and of thumbnails `diversity`; `prompt_diversity` where prompts repeat."""
    means = {name: v.mean().item() for name, v in metrics.items() if name not in (THUMBNAIL, PROMPT)}
    if THUMBNAIL not in metrics:
        return means
    distances = distance(metrics[THUMBNAIL])
    pairs = torch.ones_like(distances).triu(diagonal=1).bool()
    same = pairs & (metrics[PROMPT][:, None] == metrics[PROMPT])
    variety = {"diversity": distances[pairs], "prompt_diversity": distances[same]}
    return {**means, **{name: found.mean().item() for name, found in variety.items() if len(found)}}


def dark(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Share of pixels darker than a tenth of white."""
    return (_luma(images) < _DARK).float().mean(dim=(1, 2))


def edge_density(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Share of pixels that differ from the next ones, right and below, by more than a tenth of white."""
    luma = _luma(images)
    right, down = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    return (torch.hypot(right, down) > _EDGE).float().mean(dim=(1, 2))


def colour_entropy(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Entropy of each image's colours in bits, 0 to 9: eight levels of red, green and blue make 512 of them."""
    levels = (images * _LEVELS).long().clamp(0, _LEVELS - 1)
    colours = (levels * levels.new_tensor([_LEVELS**2, _LEVELS, 1])[:, None, None]).sum(1).flatten(1)
    offsets = _LEVELS**3 * torch.arange(len(images), device=images.device)
    counts = torch.bincount((colours + offsets[:, None]).flatten(), minlength=_LEVELS**3 * len(images))
    shares = counts.view(len(images), -1).float() / colours.shape[1]
    return -torch.special.xlogy(shares, shares).sum(1) / torch.tensor(2.0).log()


def distance(thumbnails: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Root mean square difference of every two thumbnails, 0 to 1."""
    # By matrix products, as for many rows otherwise, equal thumbnails would not be at distance 0.
    found = torch.cdist(thumbnails, thumbnails, compute_mode="donot_use_mm_for_euclid_dist")
    return found / thumbnails.shape[1] ** 0.5


def _luma(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b H W"]:
    return (images * images.new_tensor(_LUMA)[:, None, None]).sum(1)
