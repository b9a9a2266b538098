"""Craftor's own training step on a benchmark's workload: the one file here that knows the engine.

What a worker does between a batch of token ids and the optimiser's step, by the task itself; without Ray and logging.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.models import Workload, workload
from craftor import prefix, seeds
from craftor.decode import decode
from craftor.embed import embed
from craftor.recipe import Recipe
from craftor.stream import Rows
from craftor.tasks.reward_tuning import RewardTuningTask

LORA_RANK = 4
"""TRL's."""
CLIP_NORM = 1.0


class CraftorStep:
    """`step()` is one optimiser step; `backward(noise)` leaves the gradient in `module`."""

    def __init__(
        self,
        work: Workload,
        *,
        trains: Literal["text_encoder", "unet", "unet_lora"] = "text_encoder",
        cached: bool = False,
        recompute: bool | int = False,
        device: torch.device | str = "cpu",
        model: Mapping[str, str | bool] | None = None,
    ) -> None:
        """`cached` takes the latents at the window's start from a store instead of denoising.

        `recompute` is the recipe's: every window step's graph is rebuilt, none is, or so many of the earliest are;
        `model` has further keys of its `[model]`.
        """
        part = trains.removesuffix("_lora")
        settings = {"method": "lora", "rank": LORA_RANK} if trains.endswith("_lora") else {}
        self.work = work
        recipe = Recipe.model_validate(
            {
                "name": work.name,
                "model": {"path": str(work.pipeline), **(model or {})},
                "data": {"path": "the workload's prompts"},
                "optimizer": {"lr": work.lr},
                "run": {"num_steps": 1, "batch_size": len(work.prompts)},
                "task": {
                    "kind": "reward_tuning",
                    "train": {part: settings},
                    "rollout": {"num_steps": work.num_steps, "guidance_scale": work.guidance_scale},
                    "window": {"last": work.window, "recompute": recompute},
                    "rewards": {name: source.settings for name, source in work.rewards.items()},
                },
            }
        )
        self.task = RewardTuningTask(recipe, device)
        self.module = self.task.module[part]
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=work.lr)
        ids = self.task.diffuser.tokenize(work.prompts)["text_encoder"].cpu().numpy()
        self.columns = {"input_ids": ids, "prompt": np.array(work.prompts, dtype=object)}
        self.batch = 0
        if cached:
            self.columns = {**self.columns, prefix.LATENTS: self.stored}

    @property
    def position(self) -> list[int]:
        size = len(self.work.prompts)
        return list(range(self.batch * size, (self.batch + 1) * size))

    def noise(self) -> Float[Tensor, "b c h w"]:
        """What the current batch starts from: each sample's own."""
        return seeds.normal(0, self.position, "noise", self.task.diffuser.latent_shape)

    def step(self) -> None:
        self.task.step(Rows(self.position, self.columns))
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.batch += 1

    def backward(self, noise: Float[Tensor, "b c h w"]) -> None:
        assert torch.equal(noise, self.noise()), "the gradient of a batch starts from that batch's noise"
        self.task.step(Rows(self.position, self.columns))

    @cached_property
    def stored(self) -> np.ndarray:
        """One batch's latents at the window's start, as a cache delivers them."""
        rows = Rows(self.position, self.columns)
        with torch.no_grad():
            original, _ = self.task._embed(rows)
        return self.task._prefix(rows, original, self.task.span.start).latents.flatten(1).cpu().numpy()

    def floor(self) -> dict[str, Callable[[], object]]:
        """The calls an encoder step with the prefix in the worker cannot avoid, alone, on tensors of the step's shapes.

        The first window step owes its latents no gradient. Not here, so all of it is overhead: guidance, the solver,
        noise, the walk through the chain, clipping and the optimiser.
        """
        task, (size, first, last) = self.task, (len(self.work.prompts), self.task.span.start, self.task.span.stop)
        ids = {
            name: torch.cat([task.null_ids[name], own]) for name, own in Rows(self.position, self.columns).ids().items()
        }
        unet, timesteps = task.guided.unet, [step.timestep for step in task.guided.schedule]
        stored = torch.from_numpy(self.stored).view(-1, *task.diffuser.latent_shape)
        with torch.no_grad():
            encoded = embed(task.diffuser.encoders, ids).embeds
            images = decode(task.diffuser.vae, stored)
        embeds = torch.cat([encoded[:1].expand(size, -1, -1), encoded[1:]])
        latents = torch.cat([stored] * 2)
        embeds_gradient, output_gradient = torch.randn_like(encoded), torch.randn_like(latents)

        @torch.no_grad()
        def encoder_forward() -> None:
            embed(task.diffuser.encoders, ids)

        def encoder_both_ways() -> None:
            torch.autograd.grad(embed(task.tuned, ids).embeds, self.parameters, embeds_gradient)

        @torch.no_grad()
        def unet_forward() -> None:
            for timestep in timesteps[:first]:
                unet(latents, timestep, embeds)

        def unet_both_ways() -> None:
            for index in range(first, last):
                condition, leaf = embeds.detach().requires_grad_(), latents.detach().requires_grad_(index > first)
                output = unet(leaf, timesteps[index], condition).sample
                torch.autograd.grad(output, [condition, leaf] if index > first else [condition], output_gradient)

        def decoder_both_ways() -> None:
            leaf = stored.detach().requires_grad_()
            torch.autograd.grad(task.diffuser.vae.decode(leaf).sample, leaf, images)

        def rewards_both_ways() -> None:
            for reward in task.scoring.rewards.values():
                leaf = images.detach().requires_grad_()
                torch.autograd.grad(reward(leaf, self.work.prompts).sum(), leaf)

        return {
            "encoder, forward": encoder_forward,
            "encoder, both ways": encoder_both_ways,
            f"UNet, forward × {first}": unet_forward,
            f"UNet, both ways × {last - first}": unet_both_ways,
            "decoder, both ways": decoder_both_ways,
            "rewards, both ways": rewards_both_ways,
        }


def encoder_step(model: str, folder: str, *, batch_size: int, window: int, recompute: bool | int) -> CraftorStep:
    """An encoder step by plain values, as a fresh process is told of it (`harness.peak_memory`)."""
    return CraftorStep(workload(model, batch_size, Path(folder)).with_window(window), recompute=recompute)
