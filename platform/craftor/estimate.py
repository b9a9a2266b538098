"""A recipe and a device -> does it fit, how fast, how long, for how much, and what takes the time.

The work of every part of a step is counted, not timed: torch's FLOP counter on the model's own shapes, without its
weights (on the meta device), and on one real image for the rewards. A device then does a share of its peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from craftor.devices import Device
from craftor.flops import Part, measure
from craftor.locate import locate
from craftor.plan import plan
from craftor.recipe import Recipe, RecipeError, RewardTuning, Sampled
from craftor.replay import kept_steps
from craftor_rewards import build

VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
UTILISATION = 0.4
"""Of a device's peak, in convolutions and attention of this size."""
NETWORK_BYTES = 12.5e9
"""Per second between nodes: 100 Gbit/s."""
SAMPLES_DRAWN = 64
"""Windows that are drawn at random are averaged over so many samples."""


@dataclass(frozen=True)
class Work:
    """What one sample of a step costs, by what is done, and what a worker holds."""

    flops: dict[str, float]
    half: frozenset[str]
    """Those of `flops` that run in half precision, where the device has the one that the recipe names."""
    weight_bytes: float
    """Frozen and trained, gradients, optimiser and moving average."""
    activation_bytes: float
    """Of one sample, at the worst moment of a step."""
    trained: int
    """Parameters that train."""
    shared_bytes: float = 0.0
    """Of `weight_bytes`, what workers divide among them where they hold shards."""
    gathered_bytes: float = 0.0
    """What a worker gathers for each part of its share of a step, and hands on as gradient, where they do."""


@dataclass(frozen=True)
class Prediction:
    """For the whole run; `memory_gib` is one worker's peak."""

    memory_gib: float
    fits: bool
    samples_per_second: float
    hours: float
    dollars: float
    bottleneck: str
    seconds: dict[str, float] = field(default_factory=dict)
    """Of one step, by what takes them."""


def count(recipe: Recipe) -> Work:
    """The work of a recipe's step. Raises RecipeError for tasks other than reward tuning."""
    if not isinstance(recipe.task, RewardTuning) or isinstance(recipe.task, Sampled):
        raise RecipeError(f"plan counts reward tuning; this recipe's task is {recipe.task.kind}")
    parts = pipeline_parts(recipe)
    forward, graph, replayed = calls(recipe)
    unet, vae = parts["unet"], parts["vae"]
    again, copies = int(recipe.model.gradient_checkpointing), recipe.task.window.copies
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    rewards = reward_parts(recipe, image_side(recipe))
    flops = {
        "denoising without gradient": forward * unet.forward,
        "denoising with gradient": graph * (unet.forward + unet.backward) + (replayed + again * graph) * unet.forward,
        "decoding": copies * ((1 + again) * vae.forward + vae.backward),
        "rewards": copies * sum(part.forward + part.backward for part in rewards),
        "text encoders": sum(2 * part.forward + part.backward for part in encoders),
    }
    held = (graph - replayed) * unet.graph_bytes
    scoring = copies * (vae.graph_bytes + max((part.graph_bytes for part in rewards), default=0.0))
    activations = held + max(scoring, unet.graph_bytes) + sum(part.graph_bytes for part in encoders)
    trained = sum(parts[name].parameters for name in recipe.task.train.parts if name in parts)
    every = sum(part.parameters for part in (*parts.values(), *rewards))
    beside = 5 + bool(recipe.optimizer.ema_decay)  # itself, where it began, gradient, two moments
    half = frozenset(name for name in flops if name.startswith("denoising") and recipe.model.precision != "fp32")
    weight_bytes = 4.0 * (every + beside * trained)
    if recipe.workers.strategy == "ddp":
        return Work(flops, half, weight_bytes, activations, trained)
    trains_unet = "unet" in recipe.task.train.parts
    shared = 4.0 * (beside * trained + unet.parameters)  # the original UNet too, where a copy of it trains
    passes = forward + (2 + trains_unet) * graph + replayed
    return Work(flops, half, weight_bytes, activations, trained, shared, 4.0 * passes * unet.parameters)


def predict(work: Work, recipe: Recipe, device: Device, num_workers: int, num_nodes: int, price: float) -> Prediction:
    """Time on `num_workers` devices of one kind, on `num_nodes` nodes; `price` is a device's, dollars an hour."""
    share = -(-recipe.run.batch_size // num_workers)
    at_once = min(share, recipe.run.micro_batch or share)
    halves = work.half if device.bfloat16 or recipe.model.precision == "fp16" else frozenset()
    seconds = {
        name: share * flops / (UTILISATION * (device.half if name in halves else device.single))
        for name, flops in work.flops.items()
    }
    if num_nodes > 1 and work.gathered_bytes:
        seconds["gathering weights"] = -(-share // at_once) * work.gathered_bytes / NETWORK_BYTES
    elif num_nodes > 1:
        seconds["exchanging gradients"] = 2 * 4.0 * work.trained / NETWORK_BYTES
    weights = work.weight_bytes - work.shared_bytes * (1 - 1 / num_workers)
    memory = (weights + at_once * work.activation_bytes) / 2**30 + 1.0  # context and workspaces
    step = sum(seconds.values())
    hours = step * recipe.run.num_steps / 3600
    return Prediction(
        memory,
        memory <= device.memory_gib,
        recipe.run.batch_size / step,
        hours,
        hours * num_workers * price,
        max(seconds, key=lambda name: seconds[name]),
        seconds,
    )


def calls(recipe: Recipe) -> tuple[float, float, float]:
    """UNet calls of a sample: without gradient, with, and repeated to rebuild a graph; averages over drawn windows."""
    assert isinstance(recipe.task, RewardTuning)
    window, num_steps = recipe.task.window, recipe.task.rollout.num_steps
    drawn = plan(window, num_steps, recipe.seed, range(SAMPLES_DRAWN))
    through = drawn.window.sum(dim=1) if window.gradient_path == "direct" else drawn.end - drawn.first + 1
    graph, total = through.double().mean().item(), (drawn.end + 1).double().mean().item()
    elsewhere = window.span(num_steps).start if recipe.task.prefix.mode != "worker" else 0
    forward = total - graph - elsewhere
    if window.copies > 1:
        forward, graph = forward + graph, graph * window.copies
    kept = kept_steps(window, num_steps)
    return forward, graph, max(0.0, graph - (0 if kept is None else kept))


def pipeline_parts(recipe: Recipe) -> dict[str, Part]:
    """The parts of the recipe's pipeline, by their configurations alone."""
    assert isinstance(recipe.task, RewardTuning)
    folder, trains = locate(recipe.model.path), recipe.task.train.parts
    parts: dict[str, Part] = {}
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
        vae_config = AutoencoderKL.load_config(folder, subfolder="vae")
        vae: Any = VAES[vae_config["_class_name"]].from_config(vae_config)
        unet.set_attn_processor(AttnProcessor())  # its matrix products are counted; the fused ones do the same
        side = unet.config.sample_size
        rows = 1 if recipe.task.rollout.guidance_scale == 1 else 2
        latents = torch.randn(rows, unet.config.in_channels, side, side, requires_grad=True)
        for name, family in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if name == "text_encoder_2" and unet.config.addition_embed_type != "text_time":
                continue
            config = CLIPTextConfig.from_pretrained(folder, subfolder=name, attn_implementation="eager")
            length = config.max_position_embeddings
            encoder, ids = family(config), torch.zeros(1, length, dtype=torch.int64)
            encoder.requires_grad_(name in trains)
            parts[name] = measure(encoder, partial(_embeds, encoder, ids))
        embeds = torch.randn(rows, length, unet.config.cross_attention_dim, requires_grad=True)
        added = None
        if unet.config.addition_embed_type == "text_time":
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            added = {"text_embeds": torch.randn(rows, width), "time_ids": torch.randn(rows, 6)}
        parts["unet"] = measure(
            unet.requires_grad_("unet" in trains), lambda: unet(latents, 500, embeds, added_cond_kwargs=added).sample
        )
        image = torch.randn(1, vae.config.latent_channels, side, side, requires_grad=True)
        parts["vae"] = measure(vae.requires_grad_(False), lambda: vae.decode(image).sample)
    return parts


def _embeds(encoder: nn.Module, ids: Tensor) -> Tensor:
    return encoder(ids)[0]


def image_side(recipe: Recipe) -> int:
    """Pixels of an image's side."""
    folder = locate(recipe.model.path)
    unet: Any = UNet2DConditionModel.load_config(folder, subfolder="unet")
    vae: Any = AutoencoderKL.load_config(folder, subfolder="vae")
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def reward_parts(recipe: Recipe, side: int) -> list[Part]:
    """The rewards that training workers compute, each on one real image; their weights must be here."""
    assert isinstance(recipe.task, RewardTuning)
    parts = []
    for settings in recipe.task.rewards.values():
        if settings.in_training and settings.placement == "inline":
            reward = build(settings.kind, locate(settings.weights), **settings.options)
            image = torch.rand(1, 3, side, side, requires_grad=True)
            module = reward.requires_grad_(False) if isinstance(reward, nn.Module) else nn.Identity()
            parts.append(measure(module, partial(reward, image, ["a picture"])))
    return parts


def summary(recipe: Recipe, found: Prediction, device: str, num_workers: int) -> list[tuple[str, str]]:
    """What `craftor plan` prints, line by line."""
    shares: Mapping[str, float] = found.seconds
    total = sum(shares.values())
    listed = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in sorted(shares.items(), key=lambda s: -s[1]))
    return [
        ("workers", f"{num_workers} × {device}, batches of {recipe.run.batch_size}"),
        ("memory", f"{found.memory_gib:.1f} GiB each: {'fits' if found.fits else 'does NOT fit'}"),
        ("speed", f"{found.samples_per_second:.2f} samples/s, {total:.3g} s a step"),
        ("time", f"{found.hours:.1f} h for {recipe.run.num_steps} steps"),
        ("cost", f"{found.dollars:,.0f} $"),
        ("bottleneck", f"{found.bottleneck} ({listed})"),
    ]
