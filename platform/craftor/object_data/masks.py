"""Where the object of a picture is: its own mask, its transparency, or what CLIPSeg finds for a text."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoProcessor, CLIPSegForImageSegmentation

from craftor.locate import locate
from craftor.object_data.captioners import as_pil
from craftor.object_data.settings import Masks


class Segmenter:
    """CLIPSeg (Lüddecke and Ecker 2022): a picture and a text -> where in it that is."""

    def __init__(self, settings: Masks, device: torch.device | str = "cpu") -> None:
        folder = locate(settings.model)
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
            self.model = CLIPSegForImageSegmentation.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"masks.model = {settings.model!r}: no CLIPSeg there and none in the local hub cache; fetch it with: "
                f"hf download {settings.model} ({error})"
            ) from None
        self.settings, self.device = settings, torch.device(device)
        self.model.eval().requires_grad_(False).to(self.device)

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
            found.append((likely > self.settings.threshold).float().cpu())
        return found
