"""The denoising steps before the window: in the training worker, streamed by other actors, or read from a cache.

The prefix depends on the original encoder, the UNet, the prompt, the sample's noise, the schedule and the guidance, and
on nothing that trains: it is data. All three ways compute batches of one worker's share, so they agree bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from craftor import seeds
from craftor.allocation import keep_freed_memory
from craftor.denoise import Guided, Prompt, State, sample
from craftor.diffuser import load
from craftor.embed import embed
from craftor.recipe import Recipe, RewardTuning
from craftor.stream import Rows

LATENTS, X0 = "prefix_latents", "prefix_x0"
"""Columns of rows whose prefix has been computed: float32, flat; x0 is read by multistep solvers alone."""


def compute(guided: Guided, rows: Rows, prompt: Prompt, seed: int, shape: tuple[int, int, int], stop: int) -> State:
    """From each sample's own noise through the steps before `stop`, without gradient."""
    noise = seeds.normal(seed, rows.position, "noise", shape).to(prompt.condition.embeds.device)
    return sample(guided, State(noise), prompt, range(stop))


def read(rows: Rows, shape: tuple[int, int, int], device: torch.device) -> State:
    """The state that a stage or a cache has left in the rows. Raises ValueError for latents that are not finite."""
    state = [
        torch.from_numpy(rows.columns[name]).to(device, torch.float32).view(-1, *shape)
        for name in (LATENTS, X0)
        if name in rows.columns
    ]
    bad = (~state[0].isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"prefix latents of sample {rows.position[bad[0]]} are not finite; fill the cache again")
    return State(*state)


class PrefixActor:
    """A Ray Data actor: rows with `position`, `prompt` and token ids -> the same rows with their prefix."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = Recipe.model_validate(recipe)
        assert isinstance(self.recipe.task, RewardTuning)
        self.settings = self.recipe.task
        torch.set_num_threads(self.recipe.workers.threads)
        self.diffuser = load(self.recipe.model, "cuda" if self.settings.prefix.gpus_per_actor else "cpu")
        self.guided = self.diffuser.guided(self.settings.rollout)
        self.stop = self.settings.window.span(self.guided.num_steps).start
        with torch.no_grad():
            self.null = self.diffuser.null()
        keep_freed_memory()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.passing(batch, [self.stop])[self.stop]

    @torch.no_grad()
    def passing(self, batch: dict[str, np.ndarray], stops: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """The rows with their prefix up to each of several steps, in one rollout."""
        rows = Rows([int(position) for position in batch["position"]], batch)
        condition = embed(self.diffuser.encoders, rows.ids(self.diffuser.device))
        prompt = Prompt(condition, self.null)
        state = compute(self.guided, rows, prompt, self.recipe.seed, self.diffuser.latent_shape, min(stops))
        found, here = {}, min(stops)
        for stop in sorted(stops):
            state, here = sample(self.guided, state, prompt, range(here, stop)), stop
            columns = {LATENTS: state.latents}
            if state.x0 is not None and any(step.old for step in self.guided.schedule):
                columns[X0] = state.x0
            found[stop] = {**batch, **{name: tensor.flatten(1).cpu().numpy() for name, tensor in columns.items()}}
        return found
