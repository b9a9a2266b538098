"""TRL 0.23.1's AlignPropTrainer on a benchmark's workload: its last release, unchanged, driven by its own `step`.

It is no dependency of Craftor: `make bench-train` puts the wheels `trl==0.23.1 accelerate==1.15.0 peft==0.21.2` without
their dependencies into `runs/bench/trl` and that folder on PYTHONPATH, before diffusers looks for peft and accelerate.
"""

import logging
from collections import Counter
from typing import Literal
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.models import Workload


class AlignProp:
    """`step()` is one optimiser step of the trainer: sample, score, backward, clip, AdamW.

    Equal to the other variants: prompts, number of steps, guidance, deterministic DDIM (eta 0), rewards and weights,
    the last K steps with gradient (`truncated_backprop_rand` off, its timestep T - K). Its own: a checkpoint around
    every UNet call, grad mode in the prefix too, autocast, diffusers' default attention, log-probabilities.
    """

    def __init__(self, work: Workload, *, train: Literal["full", "lora"]) -> None:
        import accelerate
        from trl.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline
        from trl.trainer.alignprop_config import AlignPropConfig
        from trl.trainer.alignprop_trainer import AlignPropTrainer

        logging.getLogger("trl").setLevel(logging.ERROR)
        accelerate.PartialState(cpu=True)  # its logger refuses to warn before there is one
        self.work = work
        self.pipeline = DefaultDDPOStableDiffusionPipeline(str(work.pipeline), use_lora=train == "lora")
        self.rewards = {name: source.load() for name, source in work.rewards.items()}
        self.drawn = 0
        config = AlignPropConfig(
            seed=0,
            log_with=None,
            mixed_precision="no",
            accelerator_kwargs={"cpu": True},
            sample_num_steps=work.num_steps,
            sample_eta=0.0,
            sample_guidance_scale=work.guidance_scale,
            train_batch_size=len(work.prompts),
            train_learning_rate=work.lr,
            truncated_backprop_rand=False,
            truncated_backprop_timestep=work.num_steps - work.window,
        )
        self.trainer = AlignPropTrainer(config, self._score, self._next_prompt, self.pipeline)
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.pipeline.unet

    def step(self) -> None:
        # Epoch 0 for ever: a later one writes a checkpoint after every step.
        self.trainer.step(epoch=0, global_step=0)

    def backward(self, noise: Float[Tensor, "b c h w"]) -> None:
        """The trainer's own rollout, rewards and loss from given noise; leaves the gradient in `module`.

        Here alone its clamp passes the gradient of saturated pixels on, as Craftor's does: else they are two functions.
        """
        pipeline = self.pipeline.sd_pipeline
        with (
            patch.object(pipeline, "prepare_latents", lambda *_arguments: noise),
            patch.object(pipeline.image_processor, "postprocess", _postprocess),
        ):
            pairs = self.trainer._generate_samples(batch_size=len(noise))
        self.trainer.calculate_loss(self.trainer.compute_rewards(pairs)).backward()

    def _next_prompt(self) -> tuple[str, dict]:
        self.drawn += 1
        return self.work.prompts[(self.drawn - 1) % len(self.work.prompts)], {}

    def _score(self, images: Tensor, prompts: tuple[str, ...], _metadata: object) -> tuple[Tensor, dict]:
        weights = {name: source.weight for name, source in self.work.rewards.items()}
        scores = [weights[name] * reward(images, list(prompts)) for name, reward in self.rewards.items()]
        return torch.stack(scores).sum(0), {}

    def unet_calls(self, noise: Float[Tensor, "b c h w"]) -> int:
        """UNet calls of one forward and backward pass: T, and once more each that carries gradient (its checkpoint)."""
        calls = Counter[str]()
        handle = self.module.register_forward_pre_hook(lambda *_: calls.update(["unet"]))
        self.backward(noise)
        handle.remove()
        self.trainer.optimizer.zero_grad()
        return calls["unet"]


def _postprocess(decoded: Float[Tensor, "b 3 H W"], **_options: object) -> Float[Tensor, "b 3 H W"]:
    images = decoded / 2 + 0.5
    return images + (images.clamp(0, 1) - images).detach()
