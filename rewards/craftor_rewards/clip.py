"""A frozen CLIP as two feature extractors: pixels with gradient, prompts without (Radford et al. 2021)."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NUM_CACHED_PROMPTS = 4096


class ClipTowers(nn.Module):
    """`CLIPModel` and `CLIPTokenizer` from one folder or repository; in float32, whatever the weights are stored in."""

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        check_weights(weights)
        try:
            clip = CLIPModel.from_pretrained(weights, use_safetensors=True, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(weights)
        except OSError as error:
            raise FileNotFoundError(_missing(weights)) from error
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_size: int = clip.config.vision_config.image_size
        self.num_tokens = min(tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
        self.width: int = clip.config.projection_dim
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def preprocess(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 size size"]:
        """Images in [0, 1] resized on the shorter side, cropped in the middle and normalised, all differentiable.

        Bicubic overshoot is not clamped: a clamp has no gradient where the resized image is darkest and brightest.
        """
        size = self.image_size
        images = images.float()
        if min(images.shape[2:]) != size:
            scale = size / min(images.shape[2:])
            shape = [round(side * scale) for side in images.shape[2:]]
            images = F.interpolate(images, size=shape, mode="bicubic", antialias=True, align_corners=False)
        top, left = ((side - size) // 2 for side in images.shape[2:])
        images = images[:, :, top : top + size, left : left + size]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        return (images - mean) / std

    def image_features(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        """Unit vectors; gradient flows to the pixels."""
        pooled = self.clip.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit vectors without gradient; each distinct prompt is encoded once while it stays in the cache."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        encoded = dict(zip(new, self._encode(new), strict=True)) if new else {}
        rows = {prompt: encoded[prompt] if prompt in encoded else self._cache[prompt] for prompt in prompts}
        for prompt, row in rows.items():
            self._cache[prompt] = row
            self._cache.move_to_end(prompt)
        while len(self._cache) > NUM_CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return torch.stack([rows[prompt] for prompt in prompts]).to(self.clip.device)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Float[Tensor, "b d"]:
        """Padded to full length, so that a prompt's features do not depend on the prompts beside it."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.num_tokens, return_tensors="pt"
        )
        pooled = self.clip.text_model(input_ids=tokens.input_ids.to(self.clip.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)


def check_weights(weights: str | Path) -> None:
    """Refuse what is neither a folder nor `owner/name` before a loader makes a long story of it."""
    if not Path(weights).is_dir() and not _is_repository(weights):
        raise FileNotFoundError(_missing(weights))


def _is_repository(weights: str | Path) -> bool:
    return isinstance(weights, str) and weights.count("/") == 1 and not weights.startswith((".", "/", "~"))


def _missing(weights: str | Path) -> str:
    if Path(weights).is_dir():
        return f"folder '{weights}' lacks a CLIP: expected config.json, model.safetensors and its tokenizer"
    fetch = f"hf download {weights}" if _is_repository(weights) else f"hf download OWNER/NAME --local-dir {weights}"
    return f"no weights at '{weights}': neither a folder nor a repository at hand; `{fetch}` fetches a public one"
