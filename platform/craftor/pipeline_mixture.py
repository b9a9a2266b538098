"""A stock diffusers pipeline uses a mixture of text encoders, each in its own timesteps, until told to stop.

The pipeline encodes its prompts once with each encoder, by its own code (guidance, clip skip, textual inversion and
images per prompt included). Its first step is given the mixture of that step at the call; at the end of each step its
own callback hands it the mixture of the next one.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from craftor.denoise import Prompt
from craftor.diffuser import ENCODERS, Diffuser
from craftor.embed import Condition
from craftor.encoders import Encoder, load_encoder, plain, pretrained
from craftor.mixture import Member, MixtureError, check_weights, prompt_at, timesteps
from craftor.registry import BundleError
from craftor.tracking import client
from craftor.versions import resolve

Source: TypeAlias = str | Path | CLIPTextModel | CLIPTextModelWithProjection | Encoder
POOLED_IGNORED = ("StableDiffusionXLControlNetInpaintPipeline",)
"""Pipelines whose loop takes no new sentence embedding from a callback."""


@dataclass(frozen=True)
class Acting:
    """An encoder in a mixture: its weight, and the timesteps in which it acts."""

    encoder: Encoder
    weight: float
    window: tuple[int, int]


def apply(
    pipe: DiffusionPipeline,
    mix: Mapping[Source, float | Mapping[str, float]],
    *,
    runs: str | Path = "runs",
    any_base: bool = False,
) -> "Applied":
    """Make a Stable Diffusion 1.x, 2.x or XL pipeline use `mix`: from text, image or mask, with ControlNet or without.

    `mix` maps encoders to a weight in [0, 1], or to `{"weight": 0.6, "from": 600, "to": 0}` with the first and last
    timestep in which it acts, by default those it was trained for, and all where that is not known. The pipeline's own
    encoder has the weight that is left. An encoder is a name in the registry (`name`, `name@alias`, `name/3`; the store
    is `MLFLOW_TRACKING_URI` or the SQLite file in `runs`), a bundle's or model's folder, a hub id, or a loaded model.

    Undone by `remove()` of what this returns, or at the end of its `with` block. Raises MixtureError for weights,
    windows and pipelines that cannot be, EncoderRefused for an encoder that does not fit; one that was trained from
    another base is refused too (as far as a pipeline in float32 can tell), unless `any_base`.
    """
    base = _base(pipe)
    members = [_acting(source, given, base, Path(runs), any_base) for source, given in mix.items()]
    check_weights([(member.weight, timesteps(member.window)) for member in members])
    if type(pipe).__name__ in POOLED_IGNORED and any("text_encoder_2" in member.encoder.modules for member in members):
        raise MixtureError(f"a {type(pipe).__name__} cannot change SDXL's second encoder from step to step")
    return Applied(pipe, members)


class Applied:
    """A mixture at work in a pipeline, and the way to undo it."""

    def __init__(self, pipe: DiffusionPipeline, members: Sequence[Acting]) -> None:
        self.pipe, self.members = pipe, tuple(members)
        self._stock = type(pipe)
        self._timesteps: list[int] = []
        """Of the call in progress; empty outside one."""
        self._encoded: tuple[Prompt, list[Member]] | None = None
        # A call looks `__call__` up in the class, so the pipeline gets a class of its own, of the same name.
        own = {
            "__module__": self._stock.__module__,
            "__call__": lambda _, *args, **kwargs: self._call(*args, **kwargs),
            "encode_prompt": lambda _, *args, **kwargs: self._encode(*args, **kwargs),
            "craftor_mixture": self,
        }
        pipe.__class__ = type(self._stock.__name__, (self._stock,), own)

    def remove(self) -> None:
        """Give the pipeline back as it was; again, nothing happens."""
        if getattr(self.pipe, "craftor_mixture", None) is self:
            self.pipe.__class__ = self._stock

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self._stock.__call__).bind(self.pipe, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given.get("prompt_embeds") is not None:
            raise MixtureError("a mixture encodes the prompt itself: give prompt, not prompt_embeds")
        theirs = given["callback_on_step_end"]
        wanted = list(getattr(theirs, "tensor_inputs", given["callback_on_step_end_tensor_inputs"]) or ())
        ours = [name for name in ("prompt_embeds", "add_text_embeds") if name in self.pipe._callback_tensor_inputs]
        given["callback_on_step_end"] = self._after_step(theirs, wanted)
        given["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys([*wanted, *ours]))
        self._timesteps = _timesteps(self.pipe, given)
        try:
            return self._stock.__call__(*bound.args, **bound.kwargs)
        finally:
            self._timesteps, self._encoded = [], None

    def _encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """What the pipeline's own method gives, but in a call the mixture of its first step."""
        output = self._stock.encode_prompt(self.pipe, *args, **kwargs)
        if not self._timesteps:
            return output
        members = []
        for member in (member for member in self.members if member.weight):
            own = {part: getattr(self.pipe, part) for part in member.encoder.modules}
            try:
                for part, module in member.encoder.modules.items():
                    setattr(self.pipe, part, module.to(self.pipe._execution_device))
                tuned = self._stock.encode_prompt(self.pipe, *args, **kwargs)
            finally:
                for part, module in own.items():
                    setattr(self.pipe, part, module)
            tuned = tuple(t if t is None else t.to(o.dtype) for t, o in zip(tuned, output, strict=True))
            members.append(Member(_prompt(tuned), member.weight, timesteps(member.window)))
        self._encoded = _prompt(output), members
        condition, null = prompt_at(*self._encoded, self._timesteps[0])
        pairs = zip(condition.tensors, null.tensors, strict=True)
        mixed = [tensor for pair in pairs for tensor in pair]
        return tuple(None if own is None else new for own, new in zip(output, mixed, strict=True))

    def _after_step(self, theirs: Callable | None, wanted: Sequence[str]) -> Callable:
        def callback(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
            if theirs is not None:
                tensors |= theirs(pipe, index, timestep, {name: tensors[name] for name in wanted})
            if index + 1 == len(self._timesteps):
                return tensors
            assert self._encoded is not None
            condition, null = prompt_at(*self._encoded, self._timesteps[index + 1])
            names = ("prompt_embeds", "add_text_embeds")
            for name, positive, negative in zip(names, condition.tensors, null.tensors, strict=False):
                if name in tensors:
                    new = torch.cat([negative, positive]) if pipe.do_classifier_free_guidance else positive
                    if new.shape != tensors[name].shape:
                        raise MixtureError(
                            f"a {type(pipe).__name__} holds {name} of shape {tuple(tensors[name].shape)}, "
                            f"and a mixture can only make {tuple(new.shape)}"
                        )
                    tensors[name] = new
            return tensors

        return callback


def _prompt(encoded: Sequence[Any]) -> Prompt:
    """(positive, negative), in SDXL with both pooled ones; without guidance nothing reads the negative."""
    positive, negative = encoded[::2], encoded[1::2]
    pairs = zip(positive, negative, strict=True)
    return Prompt(Condition(*positive), Condition(*(p if n is None else n for p, n in pairs)))


def _timesteps(pipe: DiffusionPipeline, given: Mapping[str, Any]) -> list[int]:
    """Those the call will go through: it sets them again, but only after it has encoded the prompt."""
    device, num_steps = pipe._execution_device, given["num_inference_steps"]
    found, num_steps = retrieve_timesteps(
        pipe.scheduler, num_steps, device, given.get("timesteps"), given.get("sigmas")
    )
    if "strength" in given:
        start = {"denoising_start": given["denoising_start"]} if given.get("denoising_start") is not None else {}
        found, _ = pipe.get_timesteps(num_steps, given["strength"], device, **start)
    return [round(float(timestep)) for timestep in found]


def _base(pipe: DiffusionPipeline) -> Diffuser:
    """The pipeline's parts as a record. Raises MixtureError for a pipeline that a mixture cannot steer."""
    kind = type(pipe).__name__
    if getattr(pipe, "craftor_mixture", None) is not None:
        raise MixtureError(f"this {kind} already uses a mixture; remove() that one first")
    if "prompt_embeds" not in getattr(pipe, "_callback_tensor_inputs", ()) or not hasattr(pipe, "unet"):
        raise MixtureError(
            f"a {kind}; allowed: pipelines of Stable Diffusion 1.x, 2.x and XL whose step callback takes prompt_embeds"
        )
    if not isinstance(getattr(pipe, "text_encoder", None), CLIPTextModel):
        raise MixtureError(f"a {kind} whose text_encoder is {type(getattr(pipe, 'text_encoder', None)).__name__}")
    encoders = {name: getattr(pipe, name) for name in ENCODERS if getattr(pipe, name, None) is not None}
    tokenizers = {name: getattr(pipe, name.replace("text_encoder", "tokenizer")) for name in encoders}
    return Diffuser(
        tokenizers, encoders, pipe.unet, pipe.vae, pipe.scheduler, pipe.vae_scale_factor, False, pipe.unet.dtype
    )


def _acting(source: Source, given: float | Mapping[str, float], base: Diffuser, runs: Path, any_base: bool) -> Acting:
    settings = dict(given) if isinstance(given, Mapping) else {"weight": given}
    encoder = _encoder(source, base, runs, any_base)
    if lacking := encoder.modules.keys() - base.encoders.keys():
        raise MixtureError(f"{encoder.uri}: this pipeline has no {', '.join(lacking)}")
    first, last = settings.pop("from", encoder.window[0]), settings.pop("to", encoder.window[1])
    weight = settings.pop("weight", None)
    if settings or not isinstance(weight, int | float):
        raise MixtureError(f"{encoder.uri}: {given!r}, expected a weight or {{'weight': w, 'from': t, 'to': t}}")
    num_timesteps = base.scheduler.config.num_train_timesteps
    if not (isinstance(first, int) and isinstance(last, int) and num_timesteps > first >= last >= 0):
        raise MixtureError(
            f"{encoder.uri}: acts from {first} to {last}, allowed: {num_timesteps - 1} >= from >= to >= 0"
        )
    return Acting(encoder, float(weight), (first, last))


def _encoder(source: Source, base: Diffuser, runs: Path, any_base: bool) -> Encoder:
    if isinstance(source, Encoder):
        return source
    if isinstance(source, CLIPTextModel | CLIPTextModelWithProjection):
        return plain(source, "given model", base)
    path = Path(source)
    if (path / "encoder.toml").is_file():
        return load_encoder(path, base, any_base=any_base)
    owner, _, rest = str(source).removeprefix("models:/").partition("/")
    if path.is_dir() or (rest and not rest.isdigit()):
        return plain(pretrained(str(source)), str(source), base)
    if not runs.is_dir():
        raise BundleError(
            f"{source}: not a folder, and there is no registry in {runs}; name the store's folder by runs"
        )
    return load_encoder(resolve(client(runs), str(source)), base, any_base=any_base)
