"""Prompts and noise drawn once -> the scores of any mixture of encoders on them, as a search needs them many times.

Until a tuned encoder acts, every image is the base's. So the base's latents before each denoising step are kept in a
file, made once for all trials, and a judged image begins where its first encoder does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from craftor import held_out, seeds
from craftor.allocation import keep_freed_memory
from craftor.decode import decode
from craftor.denoise import Prompt, State
from craftor.diffuser import Diffuser, load
from craftor.embed import Condition, embed
from craftor.locate import locate
from craftor.mixture import Member, sample_mixture
from craftor.recipe import Recipe, RewardTuning, Search
from craftor.run_files import write_json
from craftor_micro.captions import Description
from craftor_micro.referee import Referee
from craftor_rewards import ClipScore
from craftor_rewards import build as build_reward

BASE, STATES = "base.json", "base.safetensors"
BATCH = 12
Scores = dict[str, np.ndarray]
"""`(prompts, seeds)` by metric; NaN where a prompt does not mention what is measured."""


def search_prompts(search: Search) -> list[dict[str, Any]]:
    """The first `num_prompts` of the search's file. Raises HeldOutError where there are fewer."""
    return held_out.read("search", search.prompts, search.num_prompts)


def judge_base(recipe: dict[str, Any], folder: str, earliest: int) -> None:
    """Write the base's states from denoising step `earliest` on, and its scores, to `folder`, unless they are there.

    A function of plain data, to run as a Ray task beside the making of the prefix cache.
    """
    out = Path(folder)
    if (out / BASE).exists():
        return
    settings = Recipe.model_validate(recipe)
    torch.set_num_threads(settings.workers.threads)
    judge = Judge(settings, load(settings.model, "cuda" if settings.workers.gpu else "cpu"))
    keep_freed_memory()
    judge.walk_base(earliest)
    out.mkdir(parents=True, exist_ok=True)
    save_file(judge.states, out / STATES)
    scores = judge.scores([])
    write_json(out / BASE, {"scores": judge.means(scores), "images": {n: v.tolist() for n, v in scores.items()}})


class Judge:
    """The search's prompts, all seeds of one after those of another, embedded by the base and ready to be denoised."""

    def __init__(
        self,
        recipe: Recipe,
        diffuser: Diffuser,
        folder: Path | None = None,
        rewards: Mapping[str, Any] | None = None,
    ) -> None:
        """`recipe` is the search's own; `folder` holds what `judge_base` wrote; `rewards` exist already, by name."""
        assert isinstance(recipe.task, RewardTuning) and recipe.search is not None
        self.search, self.seed, self.diffuser = recipe.search, recipe.seed, diffuser
        # Judged as evaluation does, whatever the precision of training.
        self.guided = dataclasses.replace(diffuser.guided(recipe.task.rollout), precision=torch.float32)
        self.rewards = {
            name: (rewards or {}).get(name)
            or _on(build_reward(r.kind, locate(r.weights), **r.options), diffuser.device)
            for name, r in recipe.task.rewards.items()
        }
        self.clip = next(reward for reward in self.rewards.values() if isinstance(reward, ClipScore))
        rows = search_prompts(self.search)
        self.prompts = [row["prompt"] for row in rows]
        described = all(row.get("description") for row in rows)
        self.claims = [Description.from_json(row["description"]) for row in rows] if described else None
        self.referee = Referee.load(locate("micro:referee")).to(diffuser.device) if self.claims else None
        self.base = self.embed(diffuser.encoders)
        self.states: dict[str, Tensor] = load_file(folder / STATES) if folder else {}

    @torch.no_grad()
    def embed(self, encoders: Mapping[str, nn.Module]) -> Prompt:
        """Every prompt's condition, and the empty prompt's."""
        parts = [
            embed(encoders, self.diffuser.tokenize(self.prompts[i : i + BATCH]))
            for i in range(0, len(self.prompts), BATCH)
        ]
        condition = Condition(*(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)))
        return Prompt(condition, self.diffuser.null(dict(encoders)))

    @torch.no_grad()
    def walk_base(self, earliest: int) -> None:
        """Fill `states`: the base's latents `(steps, images, c, h, w)` before each step from `earliest` on, and after
        the last; `x0` beside them where the solver reads it."""
        walked: list[list[State]] = []
        for images in self._batches(len(self.prompts)):
            state, prompt = State(self._noise(images)), self._rows(self.base, images)
            state = sample_mixture(self.guided, state, prompt, [], range(earliest))
            passed = [state]
            for step in range(earliest, self.guided.num_steps):
                state = sample_mixture(self.guided, state, prompt, [], range(step, step + 1))
                passed.append(state)
            walked.append(passed)
        steps = list(zip(*walked, strict=True))
        self.states = {
            "earliest": torch.tensor(earliest),
            "latents": torch.stack([torch.cat([s.latents.cpu() for s in parts]) for parts in steps]),
        }
        if any(step.old for step in self.guided.schedule):
            empty = torch.zeros_like(self.states["latents"][0])
            x0 = [[s.x0 for s in parts] for parts in steps]
            self.states["x0"] = torch.stack(
                [empty if any(t is None for t in parts) else torch.cat([t.cpu() for t in parts]) for parts in x0]
            )

    @torch.no_grad()
    def scores(
        self, members: Sequence[Member], num_prompts: int | None = None, unet: UNet2DConditionModel | None = None
    ) -> Scores:
        """What the mixture's images score; a tuned `unet` changes every step. `num_prompts` takes the first so many."""
        active = [member for member in members if member.weight != 0 and len(member.steps)]
        last = self.guided.num_steps
        fork = 0 if unet is not None else min((member.steps.start for member in active), default=last)
        guided = self.guided if unet is None else dataclasses.replace(self.guided, unet=unet)
        found: dict[str, list[np.ndarray]] = {}
        for images in self._batches(num_prompts or len(self.prompts)):
            # The tuned encoders' rows travel with the base's.
            mixed = [dataclasses.replace(member, prompt=self._rows(member.prompt, images)) for member in active]
            base = self._rows(self.base, images)
            final = sample_mixture(guided, self._state(images, fork), base, mixed, range(fork, last))
            for name, values in self._judged(decode(self.diffuser.vae, final.latents), images).items():
                found.setdefault(name, []).append(values.float().cpu().numpy())
        features = np.concatenate(found.pop("feature"))
        seeds_each = self.search.num_seeds
        scores = {name: np.concatenate(values).reshape(-1, seeds_each) for name, values in found.items()}
        if seeds_each > 1:
            scores["diversity"] = diversity(features.reshape(-1, seeds_each, features.shape[-1]))
        return scores

    @staticmethod
    def means(scores: Scores) -> dict[str, float]:
        """One number a metric; none for what no prompt mentions."""
        return {name: float(np.nanmean(values)) for name, values in scores.items() if not np.isnan(values).all()}

    def _batches(self, num_prompts: int) -> list[list[int]]:
        """Numbers of images: prompt `i // num_seeds` with seed `i % num_seeds`."""
        count = num_prompts * self.search.num_seeds
        return [list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]

    def _rows(self, prompt: Prompt, images: list[int]) -> Prompt:
        return Prompt(prompt.condition[torch.tensor(images) // self.search.num_seeds], prompt.null)

    def _noise(self, images: list[int]) -> Tensor:
        # Not evaluation's purpose, so that no image of the search is one that the claim is made by.
        return seeds.normal(self.seed, images, "search", self.diffuser.latent_shape).to(self.diffuser.device)

    def _state(self, images: list[int], fork: int) -> State:
        """The base's state before step `fork`; from noise where it was not kept."""
        here = fork - int(self.states["earliest"]) if self.states else -1
        if here < 0:
            state, base = State(self._noise(images)), self._rows(self.base, images)
            return sample_mixture(self.guided, state, base, [], range(fork))
        kept = {name: self.states[name][here, images].to(self.diffuser.device) for name in self.states.keys() & {"x0"}}
        return State(self.states["latents"][here, images].to(self.diffuser.device), kept.get("x0") if fork else None)

    def _judged(self, images: Float[Tensor, "b 3 H W"], numbers: list[int]) -> dict[str, Tensor]:
        images = (images * 255).round() / 255  # as evaluation sees them
        which = [number // self.search.num_seeds for number in numbers]
        scores = {name: reward(images, [self.prompts[i] for i in which]) for name, reward in self.rewards.items()}
        if self.referee is not None and self.claims is not None:
            scores |= self.referee.judge(images, [self.claims[i] for i in which])
        return {**scores, "feature": self.clip.towers.image_features(images)}


def diversity(features: np.ndarray) -> np.ndarray:
    """1 - cosine of unit image features `(prompts, seeds, d)`, mean over the pairs of a prompt; `(prompts, 1)`."""
    similarity = features @ features.transpose(0, 2, 1)
    first, second = np.triu_indices(features.shape[1], k=1)
    return 1 - similarity[:, first, second].mean(axis=1, keepdims=True)


def _on(reward: Any, device: torch.device) -> Any:
    return reward.to(device) if isinstance(reward, nn.Module) else reward
