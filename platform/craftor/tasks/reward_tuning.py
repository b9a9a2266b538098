"""Prompts -> rewards -> gradient for the text encoder (TextCraftor, section 3.2.2 and algorithm 1)."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from craftor import objective, seeds
from craftor.decode import decode, saturated
from craftor.denoise import Chain, sample
from craftor.diffuser import assert_frozen, load
from craftor.embed import embed
from craftor.locate import locate
from craftor.recipe import Recipe, RewardTuning
from craftor.stream import Rows
from craftor_rewards import build as build_reward


class RewardTuningTask:
    """The original encoder conditions the prefix, the trained one the window; only the latter learns."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.task, RewardTuning)
        settings, self.seed = recipe.task, recipe.seed
        self.diffuser = load(recipe.model.path)
        self.guided = self.diffuser.guided(
            settings.rollout.num_steps, settings.rollout.guidance_scale, bf16=recipe.model.precision == "bf16"
        )
        self.window = settings.window.steps(settings.rollout.num_steps)
        self.recompute = settings.window.recompute
        self.rewards = {n: build_reward(r.kind, locate(r.weights)) for n, r in settings.rewards.items() if r.weight}
        self.weights = {name: settings.rewards[name].weight for name in self.rewards}
        for name, reward in self.rewards.items():
            if not reward.differentiable:
                raise ValueError(f"task.rewards.{name}: not differentiable, so it cannot be backpropagated")
        # Dropout stays off: the trained encoder starts as an exact copy of the original.
        self.module: CLIPTextModel = copy.deepcopy(self.diffuser.text_encoder).requires_grad_(True)
        self.images: Tensor | None = None
        self.null_ids = self.diffuser.tokenize([""])

    def pictures(self) -> Tensor | None:
        return self.images

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(folder / "text_encoder", safe_serialization=True)

    def assert_frozen(self) -> None:
        for name in ("text_encoder", "unet", "vae"):
            assert_frozen(getattr(self.diffuser, name), name)
        for name, reward in self.rewards.items():
            if isinstance(reward, nn.Module):
                assert_frozen(reward, name)

    def step(self, module: nn.Module, rows: Rows) -> dict[str, Tensor]:
        ids = torch.cat([self.null_ids, torch.from_numpy(rows.columns["input_ids"]).long()])
        noise = seeds.normal(self.seed, rows.position, "noise", self.diffuser.latent_shape)

        with torch.no_grad():
            null, original = embed(self.diffuser.text_encoder, ids).split([1, len(ids) - 1])
        tuned_null, tuned = embed(module, ids).split([1, len(ids) - 1])
        latents = sample(self.guided, noise, original, null, range(self.window.start))
        chain = Chain(self.guided, tuned, tuned_null, (original, null), self.window, self.recompute)
        final = chain.forward(latents)
        images = decode(self.diffuser.vae, final)
        scores, image_gradient = self._score(images.detach(), list(rows.columns["prompt"]))
        self.images = images.detach()
        (final_gradient,) = torch.autograd.grad(images, final, image_gradient)
        gradient, null_gradient = chain.backward(final_gradient)
        torch.autograd.backward([tuned, tuned_null], [gradient, null_gradient])

        total = objective.total(scores, self.weights)
        return {"loss": -total, "total": total, **scores, "saturated": saturated(images.detach())}

    def _score(self, images: Tensor, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Scores and dL/d(images); reward by reward, so that only one reward's graph is alive at a time."""
        leaf = images.requires_grad_()
        scores = {}
        for name, reward in self.rewards.items():
            score = reward(leaf, prompts)
            objective.loss(score, self.weights[name]).backward()
            scores[name] = score.detach()
        assert leaf.grad is not None
        return scores, leaf.grad
