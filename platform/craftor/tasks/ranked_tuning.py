"""Prompts -> images of the untrained model -> the best and the worst by reward -> denoising losses.

For what the reward's gradient does not reach: early steps decide what is drawn, and the gradient of a score through
all later ones says little about it; that some of a prompt's images are right says it plainly. Best-of-n as data: RAFT
(Dong et al. 2023, "Reward rAnked FineTuning") and Diffusion-DPO (Wallace et al. 2024), with pairs that rewards choose.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from craftor import objective, seeds
from craftor.decode import decode
from craftor.denoise import Guided, Prompt, State, sample
from craftor.embed import Condition
from craftor.image_statistics import measure
from craftor.recipe import RankedTuning, Recipe
from craftor.rollout import draw
from craftor.scoring import Elsewhere
from craftor.stream import Rows
from craftor.tasks.noising import Noised, at
from craftor.tasks.sampled import SampledTask


class RankedTuningTask(SampledTask):
    """One noise level's graph is alive at a time."""

    def __init__(
        self, recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None
    ) -> None:
        assert isinstance(recipe.task, RankedTuning)
        super().__init__(recipe, device, elsewhere)
        self.ranked = recipe.task
        steps = draw(self.ranked.window, self.guided.num_steps, 0.0, 0.0).steps
        self.timesteps = torch.tensor([self.guided.schedule[index].timestep for index in steps])

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        prompts = [str(prompt) for prompt in rows.columns["prompt"]] * self.many
        original, tuned = self._embed(rows)
        anchor = self.settings.anchor * (tuned.condition.embeds - original.condition.embeds).square().mean()
        start = State(self.normal(rows, "noise"))
        final = sample(self.base, start, self.each(original), range(self.base.num_steps)).latents
        with torch.no_grad():
            self.images = decode(self.diffuser.vae, final, self.diffuser.decoder_precision)
        scores = self.scoring.begin(self.images, prompts, rows.position[0] // self.batch_size)()
        total, looks = self.scoring.total(scores), measure(self.images, prompts)
        ranks, latents = self.by_prompt(total).argsort(dim=1, stable=True), self.by_prompt(final)
        best, worst = (latents[torch.arange(len(latents)), ranks[:, end]] for end in (-1, 0))

        leaf = tuned.condition.leaf()
        figures = self._learn(rows, original.condition, leaf, best, worst, share)
        self._into_encoders(tuned, Prompt(leaf, tuned.null.detach()), share * anchor)
        gap = self.by_prompt(total).amax(dim=1) - self.by_prompt(total).amin(dim=1)
        of_samples = {name: self.by_prompt(values) for name, values in {"total": total, **scores, **looks}.items()}
        of_prompts = {name: v[:, None].expand(-1, self.many) for name, v in {**figures, "gap": gap}.items()}
        return {"loss": of_prompts.pop("loss"), **of_samples, **of_prompts}

    def _learn(
        self, rows: Rows, original: Condition, leaf: Condition, best: Tensor, worst: Tensor, share: float
    ) -> dict[str, Tensor]:
        """Backward at one noise level after the other, to the leaf and, where the UNet trains, its parameters.

        Both images get the same noise, so that what they are alike in cancels.
        """
        levels = self.ranked.levels
        figures = {name: best.new_zeros(len(best)) for name in ("loss", "preferred")}
        for level in range(levels):
            within = (level + seeds.uniform(self.seed, rows.position, f"noise level {level}")) / levels
            index = (within * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)
            timesteps = self.timesteps[index].to(best.device)
            noise = seeds.normal(self.seed, rows.position, f"noise at level {level}", self.diffuser.latent_shape)
            noised = [at(self.diffuser, latents, noise.to(best), timesteps) for latents in (best, worst)]
            error = self._error(self.guided, noised[0], leaf)
            loss = self.ranked.best_weight * error
            if self.ranked.preference_weight:
                with torch.no_grad():
                    before = [self._error(self.base, one, original) for one in noised]
                margin = (error - before[0]) - (self._error(self.guided, noised[1], leaf) - before[1])
                loss = loss + self.ranked.preference_weight * objective.preference_loss(margin, self.ranked.beta)
                figures["preferred"] += (margin.detach() < 0).float() / levels
            (share * loss.mean() / levels).backward()
            figures["loss"] += loss.detach() / levels
        return figures if self.ranked.preference_weight else {"loss": figures["loss"]}

    @staticmethod
    def _error(guided: Guided, noised: Noised, condition: Condition) -> Tensor:
        """Mean squared error of what the network predicts without guidance, for each row."""
        predicted = guided.call(noised.noisy, noised.timesteps, condition)
        return (predicted - noised.target).square().mean(dim=(1, 2, 3))
