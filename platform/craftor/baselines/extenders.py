"""Prompts -> longer prompts: by rules in the micro world, by a language model elsewhere."""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from craftor import seeds
from craftor_micro.captions import POSITION_PHRASES, Description, ObjectClaim, read_claims
from craftor_micro.world import BACKGROUNDS, COLOURS, SIZES, TEXTURES

Extender = Callable[[Sequence[str]], list[str]]
"""Each prompt's extension follows from that prompt alone."""


class ExtenderError(ValueError):
    """A language model that is not to be had."""


def by_rules(prompts: Sequence[str]) -> list[str]:
    """What someone who knows the micro world's captions would make of a prompt.

    Every attribute that it leaves open gets a value, and all is said in the wording that captions use most. The world
    has no words for quality, so none can be asked for. Raises ValueError for prompts of another world.
    """
    return [_in_full(_completed(read_claims(prompt), random.Random(zlib.crc32(prompt.encode())))) for prompt in prompts]


def _completed(said: Description, rng: random.Random) -> Description:
    objects = tuple(
        ObjectClaim(o.shape, o.colour or rng.choice(list(COLOURS)), o.size or rng.choice(SIZES)) for o in said.objects
    )
    return replace(
        said,
        objects=objects,
        layout=said.layout or ("center" if len(objects) == 1 else "left of"),
        background=said.background or rng.choice(list(BACKGROUNDS)),
        texture=said.texture or rng.choice(TEXTURES),
    )


def _in_full(said: Description) -> str:
    nouns = [_article(f"{o.size} {o.colour} {o.shape}") for o in said.objects]
    assert said.layout is not None
    subject = f" {said.layout} ".join(nouns) if len(nouns) == 2 else f"{nouns[0]} {POSITION_PHRASES[said.layout]}"
    return f"a picture of {subject} on {_article(f'{said.texture} {said.background} background')}"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class ByLanguageModel:
    """Continuations sampled from a causal language model of `transformers`, by folder or hub id.

    Weights are read from safetensors and no code from the repository. Raises ExtenderError where the model is not here.
    """

    def __init__(self, model: str, *, max_new_tokens: int = 40, seed: int = 0) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self.model: Any = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, dtype=torch.float32)
        except OSError as error:
            raise ExtenderError(
                f"extender = {model!r}: not a language model's folder, nor in the local hub cache in safetensors "
                f"({str(error).splitlines()[0]}); fetch it with: hf download {model}"
            ) from None
        self.model.eval().requires_grad_(False)
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        return [self._extend(prompt) for prompt in prompts]

    def _extend(self, prompt: str) -> str:
        """Up to the end of the model's line; alone and from a seed of its own, so that no other prompt matters."""
        given = self.tokenizer(prompt, return_tensors="pt")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.generator(self.seed, zlib.crc32(prompt.encode()), "extend").initial_seed())
            tokens = self.model.generate(
                input_ids=given.input_ids,
                attention_mask=given.attention_mask,
                do_sample=True,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        added = self.tokenizer.decode(tokens[0, given.input_ids.shape[1] :], skip_special_tokens=True)
        line = added.split("\n")[0].rstrip()
        return prompt if not line.strip() else f"{prompt}{line}" if line[0] in " ,.;:" else f"{prompt} {line}"
