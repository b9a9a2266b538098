"""A frozen CLIP as two feature extractors: pixels with gradient, prompts without (Radford et al. 2021)."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from craftor_rewards import open_clip_names
from craftor_rewards.loading import find, load_tensors, missing
from craftor_rewards.preprocess import CLIP_MEAN, CLIP_STD, Clamp, Fit, Resize, preprocess
from craftor_rewards.protocol import check_inputs

__all__ = ["CLIP_MEAN", "CLIP_STD", "ClipReward", "ClipTowers"]
NUM_CACHED_PROMPTS = 4096


class ClipTowers(nn.Module):
    """`CLIPModel` and `CLIPTokenizer` from a folder, a repository, the catalogue or one file of open_clip's.

    Arithmetic is float32 whatever the weights are stored in, but for the image tower where `dtype` says otherwise: its
    output, the projection and every cosine stay float32. With `checkpoint` the image tower keeps no activations for
    its backward pass and recomputes them: a ViT-H/14's gradient then fits beside the diffusion model's. Without `text`
    the text tower is left out.
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = False,
        text: bool = True,
        fit: Fit = "crop",
        clamp: Clamp = "straight_through",
    ) -> None:
        super().__init__()
        clip, tokenizer = _load(weights, text)
        if not text:
            del clip.text_model, clip.text_projection
        clip.vision_model.to(dtype)
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fit, self.clamp, self.dtype, self.checkpoint = fit, clamp, dtype, checkpoint
        self.image_size: int = clip.config.vision_config.image_size
        self.num_tokens: int = clip.config.text_config.max_position_embeddings
        if tokenizer is not None:
            self.num_tokens = min(tokenizer.model_max_length, self.num_tokens)
        self.width: int = clip.config.projection_dim
        self.num_truncated = 0
        """Distinct prompts that were encoded so far and were longer than the tower reads."""
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        if checkpoint:
            clip.vision_model.activation_checkpointing_enable()
        self.train(False)

    def train(self, mode: bool = True) -> "ClipTowers":
        """Frozen: stays in evaluation mode. transformers checkpoints layers that say they train, so those do."""
        super().train(False)
        if self.checkpoint:
            for layer in self.clip.vision_model.encoder.layers:
                layer.training = True  # of this module alone: its attention's dropout stays off
        return self

    def preprocess(
        self, images: Float[Tensor, "b 3 H W"], *, resize: Resize = "bicubic"
    ) -> Float[Tensor, "b 3 size size"]:
        """Images in [0, 1] as the image tower reads them, all differentiable; see `preprocess.preprocess`."""
        return preprocess(images, self.image_size, fit=self.fit, resize=resize, clamp=self.clamp)

    def image_features(self, images: Float[Tensor, "b 3 H W"], *, resize: Resize = "bicubic") -> Float[Tensor, "b d"]:
        """Unit vectors; gradient flows to the pixels."""
        pixels = self.preprocess(images, resize=resize).to(self.dtype)
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.clip.visual_projection(pooled.float()), dim=-1)

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

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than the tower reads; what is beyond its last token does not count for the score."""
        ids = self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids if prompts else []
        return [len(row) > self.num_tokens for row in ids]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Float[Tensor, "b d"]:
        """Padded to full length, so that a prompt's features do not depend on the prompts beside it."""
        self.num_truncated += sum(self.truncated(prompts))
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.num_tokens, return_tensors="pt"
        )
        pooled = self.clip.text_model(input_ids=tokens.input_ids.to(self.clip.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)


class ClipReward(nn.Module):
    """What every reward made of both towers shares; a subclass turns `cosines` into its score."""

    differentiable = True
    needs_prompt = True
    fit: Fit = "crop"
    clamp: Clamp = "straight_through"

    def __init__(self, weights: str | Path, *, dtype: torch.dtype = torch.float32, checkpoint: bool = False) -> None:
        super().__init__()
        self.towers = ClipTowers(weights, dtype=dtype, checkpoint=checkpoint, fit=self.fit, clamp=self.clamp)
        self.input_size = self.towers.image_size
        self.eval().requires_grad_(False)

    def cosines(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Of matched pairs, never the batch's matrix: score i depends on image i and prompt i alone."""
        check_inputs(images, prompts)
        return (self.towers.image_features(images) * self.towers.text_features(prompts)).sum(-1)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return self.towers.truncated(prompts)


def _load(weights: str | Path, text: bool) -> tuple[CLIPModel, CLIPTokenizer]:
    """Both in float32; no tokenizer without `text`."""
    path = find(weights)
    if path.is_file():
        tensors = {name: tensor.to(torch.float32) for name, tensor in load_tensors(path).items()}
        clip = CLIPModel(open_clip_names.infer_config(tensors))
        clip.load_state_dict(open_clip_names.to_transformers(tensors))
        beside = path.parent if (path.parent / "tokenizer.json").is_file() else None
        return clip, CLIPTokenizer.from_pretrained(beside or find("clip-tokenizer")) if text else None
    try:
        clip = CLIPModel.from_pretrained(path, dtype=torch.float32)
        return clip, CLIPTokenizer.from_pretrained(path) if text else None
    except OSError as error:
        raise FileNotFoundError(
            f"folder '{path}' lacks a CLIP: expected config.json, model.safetensors and its "
            f"tokenizer; {missing('OWNER/NAME')}"
        ) from error
