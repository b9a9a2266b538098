"""How few bytes an image needs as a file: a reward that optimises itself with plain surfaces (DDPO, Black et al. 2023).

Encoders count bytes, so there is no gradient: these rewards are for policy gradients, guards and reports.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from craftor_rewards.protocol import Range, check_inputs

SETTINGS: dict[str, dict[str, Any]] = {"jpeg": {"quality": 95}, "png": {}}


class Compressibility(nn.Module):
    """Minus the size in kB (1000 bytes) of each image as a file; with `incompressible`, plus.

    file_format: "jpeg" (quality 95, as DDPO; about -200 to -40 at 512 pixels) or "png" (lossless).
    """

    differentiable = False
    needs_prompt = False

    def __init__(self, file_format: str = "jpeg", *, incompressible: bool = False) -> None:
        super().__init__()
        if file_format not in SETTINGS:
            raise ValueError(f"unknown format '{file_format}'; available: {', '.join(SETTINGS)}")
        self.file_format = file_format
        self.sign = 1.0 if incompressible else -1.0
        self.score_range: Range = "kB, above 0" if incompressible else "minus kB, below 0"

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts, needs_prompt=False)
        kilobytes = [len(file) / 1000 for file in encode(images, self.file_format)]
        return self.sign * torch.tensor(kilobytes, dtype=torch.float32, device=images.device)


def encode(images: Float[Tensor, "b 3 H W"], file_format: str) -> list[bytes]:
    """Each image in [0, 1], rounded to 8 bits, as the bytes of a "jpeg" or "png" file."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format=file_format.upper(), **SETTINGS[file_format])
        files.append(file.getvalue())
    return files
