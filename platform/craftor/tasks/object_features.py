"""How unlike an object is in what one step predicts and in the picture it is denoised to, to a frozen network.

    unlike = 1 - cos( f(crop(decode(x0))), f(crop(decode(latents))) )

with x0 the clean latents that the UNet's output implies. Both sides are cut out by the same mask, on the neutral fill,
and cropped to it. It is the target and not the reference that x0 is compared with: features tell poses apart too, and
likeness to the reference would teach what pairs of different pictures are there against, to copy it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from craftor import object_condition
from craftor.decode import decode
from craftor.diffuser import Diffuser
from craftor.locate import locate
from craftor.object_settings import ObjectFeatures
from craftor_rewards.features import build_features, identity


class Unlike:
    """The second loss of `task.features`."""

    def __init__(self, settings: ObjectFeatures, diffuser: Diffuser) -> None:
        self.settings, self.vae = settings, diffuser.vae
        self.features = build_features(locate(settings.weights)).to(diffuser.device)

    def __call__(
        self,
        x0: Float[Tensor, "b c h w"],
        latents: Float[Tensor, "b c h w"],
        masks: Float[Tensor, "b h w"],
        asked: Bool[Tensor, " b"],
    ) -> Float[Tensor, " b"]:
        """0 to 2 for the rows asked for, 0 for all others, which are not decoded."""
        found = torch.zeros(len(x0), device=x0.device)
        rows = (asked & (masks.amax(dim=(1, 2)) > 0)).nonzero().flatten()
        if len(rows):
            with torch.no_grad():
                wanted = self.features(crops(decode(self.vae, latents[rows]), masks[rows]))
            seen = self.features(crops(decode(self.vae, x0[rows]), masks[rows]))
            found = found.index_put((rows,), 1 - identity(seen, wanted))
        return found


def crops(pictures: Float[Tensor, "n 3 H W"], masks: Float[Tensor, "n h w"]) -> Float[Tensor, "n 3 H W"]:
    """The objects alone, each as large as the picture allows."""
    size = pictures.shape[2:]
    masks = F.interpolate(masks[:, None], size, mode="bilinear")
    cut = object_condition.cut_out(pictures, masks)
    boxes = [box(mask) for mask in masks[:, 0]]
    found = [one[None, :, top:bottom, left:right] for one, (top, bottom, left, right) in zip(cut, boxes, strict=True)]
    return torch.cat([F.interpolate(crop, size, mode="bilinear") for crop in found])


def box(mask: Float[Tensor, "H W"]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of the square around a mask, inside the picture; sides longer than it may be are cut."""
    (height, width), there = mask.shape, (mask > mask.max() / 2).nonzero()
    (top, left), (bottom, right) = there.amin(0).tolist(), (there.amax(0) + 1).tolist()
    side = max(bottom - top, right - left)
    top = max(0, min((top + bottom - side) // 2, height - side))
    left = max(0, min((left + right - side) // 2, width - side))
    return top, min(top + side, height), left, min(left + side, width)
