"""Prompts -> embeddings, each (encoder, text) once: a sweep over mixture weights encodes nothing twice."""

from collections import OrderedDict

import torch

from craftor.denoise import Prompt
from craftor.diffuser import Diffuser
from craftor.embed import Condition, embed
from craftor.encoders import Encoder
from craftor.mixture import Member
from craftor.serving.work import ImageRequest
from craftor.solver import Schedule


class Embeddings:
    """A least-recently-used cache by the encoder's sha256 and the text. Belongs to one thread: tokenizers do."""

    def __init__(self, base: Diffuser, capacity: int) -> None:
        self.base, self.capacity = base, capacity
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[str, str], Condition] = OrderedDict()

    def prompts(self, request: ImageRequest, schedule: Schedule) -> tuple[Prompt, tuple[Member, ...]]:
        """The base encoder's reading of a request, and each share's with the denoising steps in which it acts."""
        members = tuple(
            Member(self._prompt(request, share.encoder), share.weight, share.steps(schedule))
            for share in request.shares
            if share.weight != 0
        )
        return self._prompt(request, None), members

    def _prompt(self, request: ImageRequest, encoder: Encoder | None) -> Prompt:
        return Prompt(self._condition(encoder, request.prompt), self._condition(encoder, request.negative_prompt))

    def _condition(self, encoder: Encoder | None, text: str) -> Condition:
        key = (encoder.sha256 if encoder else "", text)
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        parts = {**self.base.encoders, **(encoder.modules if encoder else {})}
        with torch.inference_mode():
            # One text a call: the bits of its embedding must not depend on what else is asked for.
            found = self.base.null(parts) if text == "" else embed(parts, self.base.tokenize([text]))
        self._kept[key] = found
        if len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return found
