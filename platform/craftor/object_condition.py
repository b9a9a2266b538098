"""An object's pictures -> what its cross-attention reads, by a frozen image encoder: a CLIP's, or a plain ResNet.

The object is cut out by its mask and put on a fill, so that what the encoder sees of it carries no background.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, CLIPVisionModelWithProjection, PreTrainedModel, ResNetModel
from transformers.utils import logging

from craftor.diffuser import freeze
from craftor.locate import locate
from craftor.object_adapter import Tokens
from craftor_rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, preprocess

FOLDER = "image_encoder"
NEUTRAL = 0.5
FAMILIES: dict[str, type[PreTrainedModel]] = {"resnet": ResNetModel}
"""By `model_type`; every other is read as a CLIP."""


@dataclass(frozen=True)
class ImageEncoder:
    """Frozen; a CLIP is read at its pooled embedding or its penultimate layer's tokens, a ResNet at its last cells."""

    model: CLIPVisionModelWithProjection | ResNetModel
    tokens: Tokens

    @property
    def size(self) -> int:
        """Width and height in pixels of what it sees; a ResNet's is 224 where its configuration does not say."""
        return getattr(self.model.config, "image_size", 224)

    @property
    def width(self) -> int:
        if isinstance(self.model, ResNetModel):
            return self.model.config.hidden_sizes[-1]
        return self.model.config.projection_dim if self.tokens == "pooled" else self.model.config.hidden_size

    def __call__(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 1 *tokens d"]:
        """One reference a row, in [0, 1], as `added_cond_kwargs["image_embeds"]` takes it."""
        return self.see(self.pixels(images))

    def pixels(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 size size"]:
        """What it is fed with: square, of its size, normalised.

        Pictures that are not square get bars of the neutral fill: cropping would cut off what is to be shown.
        """
        height, width = images.shape[2:]
        gap_x, gap_y = max(0, height - width), max(0, width - height)
        bars = (gap_x // 2, gap_x - gap_x // 2, gap_y // 2, gap_y - gap_y // 2)
        square = F.pad(images.float(), bars, value=NEUTRAL)
        plain = isinstance(self.model, ResNetModel)
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if plain else (CLIP_MEAN, CLIP_STD)
        return preprocess(square, self.size, mean=mean, std=std)

    @torch.no_grad()
    def see(self, pixels: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b 1 *tokens d"]:
        pixels = pixels.to(self.model.device)
        if isinstance(self.model, ResNetModel):
            found = self.model(pixels)
            if self.tokens == "pooled":
                return found.pooler_output.flatten(1)[:, None]
            return found.last_hidden_state.flatten(2).mT[:, None]
        if self.tokens == "pooled":
            return self.model(pixel_values=pixels).image_embeds[:, None]
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, None]


def load(path: str | Path, tokens: Tokens, device: torch.device | str = "cpu") -> ImageEncoder:
    """From a folder, a hub id or `micro:NAME` with a CLIP or a ResNet; of what else is there only this is read.

    Raises ValueError where it is none.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a whole CLIP has a text tower too, of which every tensor would be reported
    try:
        folder = locate(str(path))
        family = FAMILIES.get(AutoConfig.from_pretrained(folder).model_type, CLIPVisionModelWithProjection)
        model, report = family.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"image encoder {str(path)!r}: no CLIP and no ResNet there and none in the local hub cache ({error})"
        ) from None
    finally:
        logging.set_verbosity(level)
    if wrong := sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])):
        raise ValueError(f"image encoder {str(path)!r}: {len(wrong)} weights missing, the first is {wrong[0]}")
    return ImageEncoder(freeze(model).to(device), tokens)


def cut_out(
    images: Float[Tensor, "b 3 H W"], masks: Float[Tensor, "b 1 H W"], fill: float = NEUTRAL
) -> Float[Tensor, "b 3 H W"]:
    """Objects on a plain fill. Raises ValueError for masks of another size, and for an empty one."""
    if masks.shape[2:] != images.shape[2:] or len(masks) != len(images):
        raise ValueError(
            f"{len(masks)} masks of {masks.shape[3]}x{masks.shape[2]} pixels for {len(images)} images of "
            f"{images.shape[3]}x{images.shape[2]}; allowed: one of the same size for each"
        )
    if (empty := (masks.flatten(1).amax(1) == 0).nonzero().flatten()).numel():
        raise ValueError(f"mask {int(empty[0])} is empty: there is no object in it")
    return torch.lerp(torch.full_like(images, fill), images, masks)
