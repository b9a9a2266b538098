"""Pictures -> sentences, by BLIP or Florence-2 of transformers, or by a function of one's own; and attributes added."""

from collections.abc import Callable, Sequence
from importlib import import_module

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from craftor.locate import locate
from craftor.object_data.settings import Attributes, Captioner
from craftor_rewards.clip import ClipTowers

Caption = Callable[[Sequence[Float[Tensor, "3 H W"]]], list[str]]
"""Pictures in [0, 1], of any sizes -> a sentence for each."""
PROMPTS = {"blip": None, "florence2": "<MORE_DETAILED_CAPTION>"}
"""Kinds of model that are known, and what each is asked."""


def build(settings: Captioner, device: torch.device | str = "cpu") -> Caption:
    """Raises ValueError where the model is none of `PROMPTS`, or is not to be found."""
    if ":" in settings.model and not settings.model.startswith("micro:"):
        return _imported(settings.model)
    folder = locate(settings.model)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"captioner.model = {settings.model!r}: no model there and none in the local hub cache; allowed: a folder "
            f"or hub id of {' or '.join(PROMPTS)}, or module:attr; fetch it with: hf download {settings.model} "
            f"({error})"
        ) from None
    if kind not in PROMPTS:
        raise ValueError(f"captioner.model = {settings.model!r}: a {kind}; allowed: {', '.join(PROMPTS)}")
    return Generated(folder, PROMPTS[kind], settings.max_new_tokens, torch.device(device))


class Generated:
    """Greedy decoding by a model of transformers."""

    def __init__(self, folder: str, prompt: str | None, max_new_tokens: int, device: torch.device) -> None:
        self.prompt, self.max_new_tokens, self.device = prompt, max_new_tokens, device
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Float[Tensor, "3 H W"]]) -> list[str]:
        pictures = [as_pil(image) for image in images]
        text = {} if self.prompt is None else {"text": [self.prompt] * len(pictures)}
        inputs = self.processor(images=pictures, return_tensors="pt", **text).to(self.device)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        said = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(sentence.split()) for sentence in said]


class AttributeReader:
    """Of each list the attribute that CLIP finds likeliest, where it is likely enough to be said."""

    def __init__(self, settings: Attributes) -> None:
        self.settings, self.towers = settings, ClipTowers(locate(settings.model))

    @torch.no_grad()
    def __call__(self, images: Sequence[Float[Tensor, "3 H W"]]) -> list[list[str]]:
        features = torch.cat([self.towers.image_features(image[None]) for image in images])
        said: list[list[str]] = [[] for _ in images]
        scale = self.towers.clip.logit_scale.exp()
        for words in self.settings.lists.values():
            texts = self.towers.text_features([self.settings.template.format(word) for word in words])
            likely, best = (scale * features @ texts.T).softmax(1).max(1)
            for row, (probability, index) in enumerate(zip(likely.tolist(), best.tolist(), strict=True)):
                if probability >= self.settings.least:
                    said[row].append(words[index])
        return said


def merge(caption: str, attributes: Sequence[str], kind: str = "") -> str:
    """One caption of a sentence, the kind of object where it is not named, and attributes that are not said yet."""
    caption = caption.strip().rstrip(".")
    missing = [word for word in attributes if not _says(caption, word)]
    if kind and not _says(caption, kind):
        caption = f"a {kind}, {caption}" if caption else f"a {kind}"
    return ", ".join(part for part in (caption, *missing) if part)


def as_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    return Image.fromarray((image.movedim(0, -1).clamp(0, 1).numpy() * 255).round().astype(np.uint8))


def _says(caption: str, words: str) -> bool:
    return f" {words.lower()} " in f" {caption.lower().replace(',', ' ').replace('.', ' ')} "


def _imported(path: str) -> Caption:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"captioner.model = {path!r}: not to be imported ({error}); allowed: module:attr") from None
    made = found() if isinstance(found, type) else found
    assert callable(made), path
    return made
