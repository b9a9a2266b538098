"""An evaluation actor: some prompts -> images of the base, the tuned mixture and the weights between, all scored.

The noise of an image follows from (prompt, seed) alone and is the same for every variant.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from craftor import evaluation_files, objective, seeds, trainable
from craftor.allocation import keep_freed_memory
from craftor.baselines import methods
from craftor.baselines.sampling import Base
from craftor.decode import decode
from craftor.denoise import Prompt, State
from craftor.diffuser import load
from craftor.embed import embed
from craftor.evaluation_files import STRIP_WEIGHTS
from craftor.locate import locate
from craftor.mixture import Member, sample_mixture
from craftor.recipe import Recipe, Tuning
from craftor_micro.captions import Description
from craftor_micro.referee import Referee
from craftor_rewards import ClipScore
from craftor_rewards import build as build_reward
from craftor_rewards.aesthetic import Aesthetic
from craftor_rewards.clip import ClipReward
from craftor_rewards.paper import paper_scores

NUM_STRIPS = 48
PAPER, PAPER_BATCH = "_paper", 4
"""Suffix of scores computed as TextCraftor computed them, and the batch that its PickScore was averaged over."""


@dataclass(frozen=True)
class Tuned:
    """A tuned encoder's folder, its weight when fully on, and the denoising steps it acts in."""

    folder: str
    weight: float
    steps: tuple[int, int]


class Scorer:
    """Keeps the models between parts.

    `num_kept` prompts keep their pictures, `num_strips` are also made with the weights between; `paper` adds the
    paper's own scores.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        tuned: list[dict[str, Any]],
        num_kept: int,
        paper: bool = False,
        num_strips: int = NUM_STRIPS,
    ) -> None:
        self.recipe = Recipe.model_validate(recipe)
        assert isinstance(self.recipe.task, Tuning) and self.recipe.evaluation is not None
        torch.set_num_threads(self.recipe.workers.threads)
        task = self.recipe.task
        device = "cuda" if self.recipe.workers.gpu else "cpu"
        self.diffuser = load(self.recipe.model.model_copy(update={"precision": "fp32"}), device)
        self.guided = self.diffuser.guided(task.rollout)
        self.rewards = {name: build_reward(r.kind, locate(r.weights), **r.options) for name, r in task.rewards.items()}
        for reward in self.rewards.values():
            if isinstance(reward, nn.Module):
                reward.to(device)
        self.clip = next(reward for reward in self.rewards.values() if isinstance(reward, ClipScore))
        self.weights = {name: r.weight for name, r in task.rewards.items() if not r.evaluation_only}
        self.num_kept, self.paper, self.num_strips = num_kept, paper, num_strips
        self.tuned = [Tuned(t["folder"], t["weight"], tuple(t["steps"])) for t in tuned]
        parts = [trainable.load(self.diffuser, Path(t.folder)) for t in self.tuned]
        self.encoders = [{**self.diffuser.encoders, **{n: p for n, p in x.items() if n != "unet"}} for x in parts]
        self.unets = [found["unet"] for found in parts if "unet" in found]
        self.tuned_guided = self.diffuser.guided(task.rollout, self.unets[0]) if self.unets else self.guided
        self.referee = Referee.load(locate("micro:referee"))
        base = Base(self.diffuser, task.rollout, self.recipe.seed)
        self.methods = methods.build(self.recipe.evaluation.methods, base, self.rewards)
        keep_freed_memory()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One part: its number and its prompts as JSON -> the same number and its images as Parquet."""
        packed = [evaluation_files.pack(self.images(json.loads(rows))) for rows in batch["rows"]]
        return {"part": batch["part"], "packed": np.array(packed, dtype=object)}

    def images(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records of all images of some prompts, made together."""
        assert self.recipe.evaluation is not None
        prompts = [row["prompt"] for row in rows]
        results: list[list[dict[str, Any]]] = [[] for _ in rows]
        for seed in range(self.recipe.evaluation.num_seeds):
            for variant, exact in self._images(rows, seed).items():
                # Every scorer sees what a user would: 8-bit images.
                images = (exact * 255).round() / 255
                scores = self._scores(images, prompts, [row["description"] for row in rows])
                if self.paper:
                    scores |= self._paper_scores(exact, prompts)
                features = self.clip.towers.image_features(images)
                for i, row in enumerate(rows):
                    kept = row["number"] < self.num_kept
                    results[i].append(
                        {"number": row["number"], "prompt": row["prompt"], "seed": seed, "variant": variant}
                        | ({"categories": row["categories"]} if "categories" in row else {})
                        | {name: _plain(values[i].item()) for name, values in scores.items()}
                        | {"feature": features[i].tolist(), "png": _png(images[i]) if kept else None}
                    )
        return [image for images in results for image in images]

    @torch.no_grad()
    def _images(self, rows: list[dict[str, Any]], seed: int) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in rows]
        base, *tuned = (self._prompt(encoders, prompts) for encoders in (self.diffuser.encoders, *self.encoders))
        shape = self.diffuser.latent_shape
        draws = [seeds.normal(self.recipe.seed, [seed], f"evaluation {row['index']}", shape) for row in rows]
        noise = torch.cat(draws).to(self.diffuser.device)
        # The steps before any tuned encoder acts are the same for every variant, unless the UNet itself is another.
        fork = 0 if self.unets else min(t.steps[0] for t in self.tuned)
        common = sample_mixture(self.guided, State(noise), base, [], range(fork))
        strip = seed == 0 and min(row["number"] for row in rows) < self.num_strips
        variants = {"base": 0.0, "tuned": 1.0} | ({f"w{w}": w for w in STRIP_WEIGHTS[1:-1]} if strip else {})
        images = {}
        for variant, scale in variants.items():
            members = [
                Member(prompt, scale * t.weight, range(*t.steps)) for prompt, t in zip(tuned, self.tuned, strict=True)
            ]
            guided = self.tuned_guided if scale else self.guided
            final = sample_mixture(guided, common, base, members, range(fork, guided.num_steps))
            images[variant] = decode(self.diffuser.vae, final.latents)
        drawn_by = [row["index"] for row in rows]
        return {**images, **{name: method(prompts, drawn_by, seed) for name, method in self.methods.items()}}

    def _prompt(self, encoders: dict[str, nn.Module], prompts: list[str]) -> Prompt:
        return Prompt(embed(encoders, self.diffuser.tokenize(prompts)), self.diffuser.null(encoders))

    @torch.no_grad()
    def _scores(self, images: Tensor, prompts: list[str], descriptions: list[dict | None]) -> dict[str, Tensor]:
        scores = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        scores["total"] = objective.total(scores, self.weights)
        if all(d is not None for d in descriptions):
            scores |= self.referee.judge(images.cpu(), [Description.from_json(d) for d in descriptions if d])
        return scores

    def _paper_scores(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Other preprocessing, images before rounding, PickScore over the pairs of four prompts."""
        scores = {}
        for name, reward in self.rewards.items():
            if isinstance(reward, ClipReward | Aesthetic):
                scored = [
                    paper_scores(reward, images[i : i + PAPER_BATCH], prompts[i : i + PAPER_BATCH])
                    for i in range(0, len(prompts), PAPER_BATCH)
                ]
                scores[name + PAPER] = torch.cat(scored)
        return scores


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _plain(value: float) -> float | None:
    """An attribute the prompt does not mention is null, in JSON as in Parquet."""
    return None if value != value else value
