"""A request's body -> the images it asks for, or a 400 that names the parameter, the value and what is allowed."""

import math
import secrets
from dataclasses import dataclass
from typing import TypeVar

from craftor.diffuser import Diffuser
from craftor.mixture import MixtureError, check_weights, timesteps
from craftor.serving import given
from craftor.serving.errors import ApiError
from craftor.serving.library import Library, NotServed
from craftor.serving.objects import Shown
from craftor.serving.references import Sent
from craftor.serving.schema import MAX_SEED, Asked, Edit, Generation, Mix, Portion
from craftor.serving.settings import SIZE, Serving
from craftor.serving.work import ImageRequest, Share

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Interpreter:
    """What the words of a request mean on this server."""

    settings: Serving
    base: Diffuser
    library: Library

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) by `WIDTHxHEIGHT`, the model's own first."""
        height, width = (side * self.base.pixels_per_latent for side in self.base.latent_shape[1:])
        own = {f"{width}x{height}": (height, width)}
        return own | {size: (int(h), int(w)) for size in self.settings.limits.sizes for w, h in [size.split("x")]}

    def images(self, body: Asked, caller: str, sent: Sent | None = None) -> list[ImageRequest]:
        """All images of a request: mixture by mixture, seeds in order. Canaries are drawn by `caller`.

        `sent` are an `Edit`'s pictures.
        """
        limits, defaults = self.settings.limits, self.settings.defaults
        if body.model not in (None, self.settings.name):
            raise ApiError(
                404,
                f"no model {body.model!r}; there is: {self.settings.name}",
                param="model",
                code="model_not_found",
            )
        prompt = _text(body.prompt, "prompt", limits.prompt_chars)
        if not prompt.strip():
            raise ApiError(400, "prompt: is empty", param="prompt", code="invalid_value")
        negative = _text(body.negative_prompt, "negative_prompt", limits.prompt_chars)
        steps = _at_most(body.steps or defaults.steps, "steps", limits.steps)
        guidance = body.guidance_scale or defaults.guidance_scale
        guidance = _at_most(guidance, "guidance_scale", limits.guidance_scale)
        if body.partial_images and not body.stream:
            raise ApiError(400, "partial_images: goes with stream = true", param="partial_images", code="invalid_value")
        if body.stream and body.response_format == "url":
            message = "response_format: 'url' does not go with stream = true"
            raise ApiError(400, message, param="response_format", code="invalid_value")
        if body.sweep is not None and body.mix:
            raise ApiError(400, "sweep: stands in for mix; give one of them", param="sweep", code="invalid_value")
        mixes = [("mix", body.mix)] if body.sweep is None else [(f"sweep.{i}", m) for i, m in enumerate(body.sweep)]
        param = "n" if body.sweep is None else "sweep"
        count = body.n or 1
        _at_most(count * len(mixes), param, limits.images, what="images of one request")
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        if seed + count - 1 > MAX_SEED:
            raise ApiError(400, f"seed: {seed} + n is over {MAX_SEED}", param="seed", code="invalid_value")
        size = self.size(body.size)
        files = sent.files if sent is not None else given.decoded(body) if isinstance(body, Generation) else {}
        upload = given.upload(body, files, size)
        control = given.control(body, files, size, served=self.settings.controlnet is not None)
        shown = self._shown(body, sent, steps, guidance) if isinstance(body, Edit) and sent is not None else None
        return [
            ImageRequest(
                prompt=prompt,
                seed=seed + k,
                shares=shares,
                negative_prompt=negative,
                num_steps=steps,
                guidance_scale=guidance,
                solver=body.scheduler or defaults.scheduler,
                size=size,
                upload=upload,
                control=control,
                shown=shown,
                previews=body.partial_images or 0,
            )
            for shares in [self._shares(mix, param, caller) for param, mix in mixes]
            for k in range(count)
        ]

    def _shown(self, body: Edit, sent: Sent, steps: int, guidance: float) -> Shown | None:
        weight = guidance if body.object_weight is None else body.object_weight
        weight = _at_most(weight, "object_weight", self.settings.limits.guidance_scale)
        first = _at_most(body.object_from or 0, "object_from", steps - 1)
        return None if weight == 0 else Shown(sent.encoder, sent.references, weight, first, sent.regions)

    def size(self, text: str | None) -> tuple[int, int]:
        """(height, width) of a request's pictures. Raises ApiError."""
        known = self.sizes
        if text in (None, "auto"):
            return next(iter(known.values()))
        if text not in known:
            raise ApiError(
                400,
                f"size: {text!r} is not offered; allowed: auto, {', '.join(known)}",
                param="size",
                code="invalid_value",
            )
        return known[text]

    def _shares(self, mix: Mix, param: str, caller: str) -> tuple[Share, ...]:
        _at_most(len(mix.keys() - {"base"}), param, self.settings.limits.encoders, what="encoders in one mixture")
        shares = tuple(
            self._share(name, part, f"{param}.{name}", caller) for name, part in mix.items() if name != "base"
        )
        try:
            check_weights([(share.weight, timesteps(share.window)) for share in shares])
            self._base_is_what_is_left(mix, shares)
        except MixtureError as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_mixture") from None
        return shares

    def _base_is_what_is_left(self, mix: Mix, shares: tuple[Share, ...]) -> None:
        """The base may be named, for the sum to be seen to be 1."""
        if "base" not in mix:
            return
        part = mix["base"]
        if isinstance(part, Portion) and (part.first, part.last) != (None, None):
            raise MixtureError("base acts at every timestep, with what the others leave there: no from or to")
        weight = part.weight if isinstance(part, Portion) else part
        total = sum(share.weight for share in shares)
        if not math.isclose(weight + total, 1, abs_tol=1e-6):
            raise MixtureError(f"base is {weight:g} and the others sum to {total:g}: together 1, or leave the base out")

    def _share(self, name: str, part: float | Portion, param: str, caller: str) -> Share:
        try:
            encoder = self.library.find(name, caller)
        except NotServed as error:
            raise ApiError(400, str(error), param=param, code="encoder_not_found") from None
        portion = part if isinstance(part, Portion) else Portion(weight=part)
        first = encoder.window[0] if portion.first is None else portion.first
        last = encoder.window[1] if portion.last is None else portion.last
        if first < last:
            message = f"{param}: from = {first} comes before to = {last}; timesteps fall from 999 to 0"
            raise ApiError(400, message, param=param, code="invalid_value")
        return Share(encoder, portion.weight, (first, last))


def check_sizes(settings: Serving, base: Diffuser) -> None:
    """Raises ValueError for a size in the settings that this model cannot make."""
    unit = base.pixels_per_latent * 2 ** (len(base.unet.config.block_out_channels) - 1)
    for size in settings.limits.sizes:
        assert SIZE.fullmatch(size)
        if any(int(side) % unit for side in size.split("x")):
            raise ValueError(f"limits.sizes: {size}: width and height must be multiples of {unit} for this model")


def _text(text: str, param: str, limit: int) -> str:
    if len(text) > limit:
        raise ApiError(400, f"{param}: {len(text)} characters, allowed: {limit}", param=param, code="invalid_value")
    if any(ord(c) < 32 and c not in "\t\n\r" or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise ApiError(400, f"{param}: has control characters", param=param, code="invalid_value")
    return text


def _at_most(number: Number, param: str, limit: Number, *, what: str = "") -> Number:
    if number > limit:
        described = f"{number:g} {what}".rstrip()
        raise ApiError(400, f"{param}: {described}, allowed: up to {limit:g}", param=param, code="invalid_value")
    return number
