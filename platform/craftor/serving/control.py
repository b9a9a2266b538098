"""A picture that says where things are: a ControlNet's residuals for rows that have one, beside rows that have none.

ControlNet (Zhang et al. 2023) reads latents, prompt and picture at every step, and adds to what the UNet's blocks make
of them. To a row without a picture it adds zero, so that row has the bits it would have without a ControlNet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel
from jaxtyping import Float, Int
from torch import Tensor

from craftor.denoise import Guided
from craftor.diffuser import Diffuser, freeze
from craftor.embed import Condition
from craftor.locate import locate
from craftor.prefix_cache import weights_digest

SHARED = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")
"""What a ControlNet's configuration must share with the UNet that it steers."""


@dataclass(frozen=True, eq=False)
class Control:
    """What one image is steered by."""

    image: Float[Tensor, "3 H W"]
    scale: float
    """0 for no influence, 1 for that of its training."""
    sha256: str
    """Of the uploaded file."""


@dataclass(frozen=True, eq=False)
class ControlNet:
    """A network that steers one UNet, frozen and on its device."""

    module: ControlNetModel
    sha256: str
    """Of its weights."""

    def residuals(
        self,
        unet: Guided,
        controls: Sequence[Control | None],
        latents: Float[Tensor, "b c h w"],
        condition: Condition,
        timesteps: Int[Tensor, " b"],
    ) -> dict[str, Any]:
        """What the UNet's call takes in addition, for slots of which some are steered; nothing where none is."""
        steered = [control for control in controls if control]
        if not steered:
            return {}
        none = torch.zeros_like(steered[0].image)
        pictures = torch.stack([control.image if control else none for control in controls]).to(latents.device)
        scales = torch.tensor([control.scale if control else 0.0 for control in controls], device=latents.device)
        scales = scales.view(-1, 1, 1, 1)
        with unet.arithmetic(latents):
            blocks, middle = self.module(
                latents,
                timesteps,
                condition.embeds,
                pictures,
                added_cond_kwargs=unet.added(condition, len(latents)),
                return_dict=False,
            )
        return {
            "down_block_additional_residuals": [torch.where(scales == 0, 0, scales * block) for block in blocks],
            "mid_block_additional_residual": torch.where(scales == 0, 0, scales * middle),
        }


def load_controlnet(path: str, base: Diffuser) -> ControlNet:
    """A folder or hub id. Raises ValueError where it is no ControlNet in safetensors, or one for another UNet."""
    try:
        module = ControlNetModel.from_pretrained(locate(path), torch_dtype=torch.float32, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"controlnet = {path!r}: not a ControlNet in safetensors ({error})") from None
    for key in SHARED:
        ours, wanted = (_plain(part.config[key]) for part in (module, base.unet))
        if ours != wanted:
            raise ValueError(f"controlnet = {path!r}: has {key} = {ours!r}, the model's UNet {wanted!r}")
    return ControlNet(freeze(module).to(base.device), weights_digest([module]))


def _plain(value: Any) -> Any:
    """A configuration's sequences are lists once they have been on disk."""
    return list(value) if isinstance(value, tuple) else value
