"""Sections of a recipe beside its task: model, data, optimiser, run, registration, evaluation. Imports no torch."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from craftor.baselines.settings import MethodSettings
from craftor.rollout import Section

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""`auto` is bf16 where the device multiplies it, else fp32: a CPU without AVX-512 is many times slower in bf16."""


class Model(Section):
    path: str
    """A `StableDiffusionPipeline` folder or hub id; `micro:NAME` is a folder shipped with `craftor_micro`."""
    precision: Precision = "fp32"
    """Arithmetic of the UNet; what trains keeps fp32 master weights. Evaluation has its own."""
    decoder_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the decoder while training; fp16 is too narrow for many a decoder."""
    attention: Literal["auto", "xformers", "sdpa", "eager"] = "auto"
    channels_last: bool | None = None
    """Layout of images in UNet and decoder; by default channels last on CPU, but for what has group norms in bf16."""
    compile: bool = False
    """Compile the UNet: minutes once, faster steps after."""
    gradient_checkpointing: bool = False
    """Rebuild activations inside the UNet, the decoder and what trains: less memory, one more forward pass."""
    text_encoder: str | None = None
    """A tuned encoder (a folder) that conditions the window instead of the base's own: to train the UNet after it."""


class Data(Section):
    path: str
    """Parquet, CSV, JSONL or text; a local path, an fsspec URL, or `micro:FILE`. Image-caption pairs are Parquet."""
    column: str = "prompt"
    max_rows: int | None = Field(None, ge=1)
    min_chars: int = Field(1, ge=1)
    max_chars: int = Field(1000, ge=1)
    deduplicate: bool = True


class Optimizer(Section):
    lr: float = Field(gt=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    cosine_from: float = Field(1.0, ge=0, le=1)
    """Share of the run after which the learning rate falls to zero along a cosine; 1 keeps it constant."""
    ema_decay: float | None = Field(None, gt=0, lt=1)


class Run(Section):
    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Samples per optimiser step over all workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples a worker computes at once; their gradients add up to those of the worker's whole share."""
    checkpoint_every: int = Field(50, ge=1)
    storage: str | None = None
    """An fsspec URL that is the run's home, for clusters whose nodes share no folder; the run's folder mirrors it."""


class Register(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    aliases: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @field_validator("aliases")
    @classmethod
    def _not_reserved(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        if any(alias.lower() == "latest" for alias in aliases):
            raise ValueError("'latest' is reserved by MLflow; choose another alias, for example 'candidate'")
        return aliases


class Evaluation(Section):
    prompts: str
    """Held-out prompts: JSONL with a `prompt` and, in the micro world, a `description` the referee judges by."""
    num_prompts: int = Field(200, ge=2)
    num_seeds: int = Field(2, ge=1)
    use_from: int | None = Field(None, ge=0)
    """First denoising step that sees the tuned encoder; by default the window's first."""
    weight: float = Field(1.0, ge=0, le=1)
    """Weight of the tuned embedding; the base has the rest."""
    precision: Precision = "fp32"
    """What the UNet computes in: images, and so scores, differ a little with it, and bf16 takes less time."""
    methods: dict[str, MethodSettings] = {}
    """What else is compared with the base, by names of your own: longer prompts, the best of several images."""

    @field_validator("methods")
    @classmethod
    def _method_names_are_free(cls, methods: dict[str, MethodSettings]) -> dict[str, MethodSettings]:
        for name in methods:
            if not re.fullmatch(r"[a-z][a-z_0-9]*", name) or name in ("base", "tuned"):
                raise ValueError(f"a method is named {name!r}; allowed: letters, digits and _, but not base or tuned")
        return methods


class Validation(Section):
    """Score every checkpoint on held-out prompts while training goes on, in Ray tasks beside the workers."""

    prompts: str
    """As evaluation's; not the same prompts, where a checkpoint is to be chosen by them."""
    num_prompts: int = Field(16, ge=2)
    num_seeds: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)
    """Of the task: what Ray reserves, and its number of threads."""
    num_gpus: float = Field(0.0, ge=0)
    """Of the task, which computes on the GPU unless this is 0."""
    resources: dict[str, float] = {}
    """Ray's own names of resources, which send the task to other nodes than the workers': `{ inference = 1 }`."""
    timeout_s: float = Field(1800, gt=0)
    """A validation that takes longer is given up; training is not."""
