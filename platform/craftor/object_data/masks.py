"""Where a picture's object is: its own mask, its transparency, or what CLIPSeg finds for a text, outlined by SAM 2."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoProcessor, CLIPSegForImageSegmentation, PreTrainedModel, Sam2Model

from craftor.locate import locate
from craftor.object_data.captioners import as_pil
from craftor.object_data.settings import Masks
from craftor_rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD


class Segmenter:
    """CLIPSeg (Lüddecke and Ecker 2022): a picture and a text -> where in it that is."""

    def __init__(self, settings: Masks, device: torch.device | str = "cpu") -> None:
        self.settings, self.device = settings, torch.device(device)
        self.model = _load(CLIPSegForImageSegmentation, "masks.model", settings.model, self.device)
        self.processor = AutoProcessor.from_pretrained(locate(settings.model))
        self.outline = Outline(settings.outline, self.device) if settings.outline is not None else None

    @torch.no_grad()
    def __call__(self, images: Sequence[Float[Tensor, "3 H W"]]) -> list[Float[Tensor, "1 H W"]]:
        """0 or 1 for each pixel; all 0 where nothing like the text is found."""
        found = []
        for image in images:
            inputs = self.processor(
                text=[self.settings.prompt], images=[as_pil(image)], padding=True, return_tensors="pt"
            ).to(self.device)
            logits = self.model(**inputs).logits.reshape(1, 1, *inputs.pixel_values.shape[-2:])
            likely = F.interpolate(logits.sigmoid(), size=image.shape[1:], mode="bilinear", align_corners=False)[0]
            mask = (likely > self.settings.threshold).float().cpu()
            found.append(self.outline(image, mask) if self.outline is not None and mask.any() else mask)
        return found


class Outline:
    """SAM 2 (Ravi et al. 2024): a picture and a rough mask -> the mask of what fills the rough one's box."""

    def __init__(self, model: str, device: torch.device) -> None:
        self.model = _load(Sam2Model, "masks.outline", model, device)
        self.side: int = self.model.config.prompt_encoder_config.image_size

    @torch.no_grad()
    def __call__(self, image: Float[Tensor, "3 H W"], rough: Float[Tensor, "1 H W"]) -> Float[Tensor, "1 H W"]:
        """0 or 1 for each pixel. transformers' own preprocessing of it needs torchvision; this is the same."""
        size = image.shape[1:]
        square = F.interpolate(image[None], (self.side, self.side), mode="bilinear", antialias=True)
        mean, deviation = (square.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        rows, columns = rough[0].nonzero(as_tuple=True)
        corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        box = corners * self.side / torch.tensor([size[1], size[0], size[1], size[0]])
        logits = self.model(
            pixel_values=((square - mean) / deviation).to(self.model.device),
            input_boxes=box.view(1, 1, 4).to(self.model.device),
            multimask_output=False,
        ).pred_masks
        return (F.interpolate(logits[0], size, mode="bilinear", align_corners=False)[0] > 0).float().cpu()


def _load(kind: type[PreTrainedModel], key: str, model: str, device: torch.device) -> Any:
    """Frozen, in float32. Raises ValueError naming the key and the command that fetches the model."""
    try:
        found = kind.from_pretrained(locate(model), use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key} = {model!r}: no {kind.__name__} there and none in the local hub cache; fetch it with: "
            f"hf download {model} ({error})"
        ) from None
    return found.eval().requires_grad_(False).to(device)
