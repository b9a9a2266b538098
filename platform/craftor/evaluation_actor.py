"""An evaluation actor: some prompts -> images of the base, tuned mixtures and the weights between, all scored.

The noise of an image follows from (prompt, seed) alone and is the same for every variant.
"""

import io
import json
from dataclasses import dataclass
from itertools import pairwise
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
from craftor.denoise import Guided, Prompt, State
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


@dataclass(frozen=True)
class Variant:
    """A mixture, what denoises it, and the step at which it leaves the base's path."""

    tuned: list[Tuned]
    guided: Guided
    fork: int


class Scorer:
    """Keeps the models between parts.

    variants: by name, the encoders of a mixture; each is made beside the base.

    `num_kept` prompts keep their pictures, `num_strips` are also made with the weights between base and first variant;
    `paper` adds the paper's own scores.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        variants: dict[str, list[dict[str, Any]]],
        num_kept: int,
        paper: bool = False,
        num_strips: int = NUM_STRIPS,
    ) -> None:
        self.recipe = Recipe.model_validate(recipe)
        assert isinstance(self.recipe.task, Tuning) and self.recipe.evaluation is not None
        torch.set_num_threads(self.recipe.workers.threads)
        task = self.recipe.task
        device = "cuda" if self.recipe.workers.gpu else "cpu"
        precision = self.recipe.evaluation.precision
        self.diffuser = load(self.recipe.model.model_copy(update={"precision": precision}), device)
        self.guided = self.diffuser.guided(task.rollout)
        self.rewards = {name: build_reward(r.kind, locate(r.weights), **r.options) for name, r in task.rewards.items()}
        for reward in self.rewards.values():
            if isinstance(reward, nn.Module):
                reward.to(device)
        self.clip = next(reward for reward in self.rewards.values() if isinstance(reward, ClipScore))
        self.weights = task.factors
        self.num_kept, self.paper, self.num_strips = num_kept, paper, num_strips
        loaded: dict[str, dict[str, nn.Module]] = {}
        self.variants: dict[str, Variant] = {}
        for name, mixed in variants.items():
            tuned = [Tuned(t["folder"], t["weight"], tuple(t["steps"])) for t in mixed]
            for t in tuned:
                if t.folder not in loaded:
                    loaded[t.folder] = trainable.load(self.diffuser, Path(t.folder))
            parts = [loaded[t.folder] for t in tuned]
            unets = [found["unet"] for found in parts if "unet" in found]
            guided = self.diffuser.guided(task.rollout, unets[0]) if unets else self.guided
            # The steps before any tuned encoder acts are the base's, unless the UNet itself is another.
            fork = 0 if unets else min(t.steps[0] for t in tuned)
            self.variants[name] = Variant(tuned, guided, fork)
        self.encoders = {
            folder: {**self.diffuser.encoders, **{n: p for n, p in parts.items() if n != "unet"}}
            for folder, parts in loaded.items()
        }
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
        base = self._prompt(self.diffuser.encoders, prompts)
        tuned = {folder: self._prompt(encoders, prompts) for folder, encoders in self.encoders.items()}
        shape = self.diffuser.latent_shape
        draws = [seeds.normal(self.recipe.seed, [seed], f"evaluation {row['index']}", shape) for row in rows]
        noise = torch.cat(draws).to(self.diffuser.device)
        states, num_steps = {0: State(noise)}, self.guided.num_steps
        stops = sorted({0, num_steps, *(variant.fork for variant in self.variants.values())})
        for start, stop in pairwise(stops):
            states[stop] = sample_mixture(self.guided, states[start], base, [], range(start, stop))
        strip = seed == 0 and min(row["number"] for row in rows) < self.num_strips
        made = [(name, variant, 1.0) for name, variant in self.variants.items()]
        if strip:
            made += [(f"w{w}", next(iter(self.variants.values())), w) for w in STRIP_WEIGHTS[1:-1]]
        images = {"base": decode(self.diffuser.vae, states[num_steps].latents)}
        for name, variant, scale in made:
            members = [Member(tuned[t.folder], scale * t.weight, range(*t.steps)) for t in variant.tuned]
            last = range(variant.fork, num_steps)
            final = sample_mixture(variant.guided, states[variant.fork], base, members, last)
            images[name] = decode(self.diffuser.vae, final.latents)
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
