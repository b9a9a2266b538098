"""Image tensors -> a PNG contact sheet."""

import math
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def save_sheet(images: Float[Tensor, "b 3 H W"], path: Path, *, columns: int = 8) -> None:
    """Images in [0, 1] side by side, row by row; the last row is filled up with white."""
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    missing = torch.ones(rows * columns - len(images), *images.shape[1:])
    tiles = torch.cat([images.float().cpu(), missing]).unflatten(0, (rows, columns))
    sheet = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(path)
