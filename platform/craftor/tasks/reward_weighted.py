"""Prompts -> images of the untrained model -> one of each prompt's, the likelier the better -> denoising loss.

For early steps: the gradient of a score through all later ones taught them nothing that we could measure, while some of
a prompt's images fit it better than others and can be learnt from as they are. Reward-weighted regression
(Peters & Schaal 2007; as Lee et al. 2023 and, as RWR, DDPO's authors use it for diffusion), by samples instead of
weights, so that each costs one call of the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from craftor import seeds
from craftor.decode import decode
from craftor.denoise import Prompt, State, sample
from craftor.embed import embed
from craftor.image_statistics import measure
from craftor.recipe import Recipe, RewardWeighted
from craftor.rollout import draw
from craftor.scoring import Elsewhere
from craftor.stream import Rows
from craftor.tasks.noising import at
from craftor.tasks.reward_tuning import RewardTuningTask

KEPT_BYTES = 1 << 30
"""Of latents that a worker keeps: prompts beyond that are drawn again whenever their turn comes."""


@dataclass(frozen=True)
class Drawn:
    """What the untrained model makes of one prompt: its samples' latents, and their total, scores and looks."""

    latents: Tensor
    figures: dict[str, Tensor]


class RewardWeightedTask(RewardTuningTask):
    """What a prompt's images are follows from the prompt alone: they are made once, and again after a restart."""

    def __init__(
        self, recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None
    ) -> None:
        assert isinstance(recipe.task, RewardWeighted)
        super().__init__(recipe, device, elsewhere)
        self.weighted, self.many = recipe.task, recipe.task.samples_per_prompt
        steps = draw(self.weighted.window, self.guided.num_steps, 0.0, 0.0).steps
        self.timesteps = torch.tensor([self.guided.schedule[index].timestep for index in steps])
        drawn_in = self.weighted.drawn_in or self.guided.num_steps
        self.base = self.diffuser.guided(self.weighted.rollout.model_copy(update={"num_steps": drawn_in}))
        self.null = self.diffuser.null()
        self.made: dict[int, Drawn] = {}
        self.room = KEPT_BYTES

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        return super().observe({name: values.flatten(0, 1) for name, values in metrics.items()})

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        drawn = self._drawn(rows)
        original, tuned = self._embed(rows)
        anchor = self.settings.anchor * (tuned.condition.embeds - original.condition.embeds).square().mean()
        figures = {name: torch.stack([of.figures[name] for of in drawn]) for name in drawn[0].figures}
        total = figures["total"]
        chosen = self._choose(rows, total)
        latents = torch.stack([of.latents[k] for of, k in zip(drawn, chosen.tolist(), strict=True)])
        which = (seeds.uniform(self.seed, rows.position, "noise level") * len(self.timesteps)).long()
        noise = seeds.normal(self.seed, rows.position, "noise", self.diffuser.latent_shape)
        noised = at(self.diffuser, latents, noise.to(latents), self.timesteps[which].to(latents.device))

        leaf = tuned.condition.leaf()
        predicted = self.guided.call(noised.noisy, noised.timesteps, leaf)
        error = (predicted - noised.target).square().mean(dim=(1, 2, 3))
        (share * error.mean()).backward()  # to the leaf and, where the UNet trains, its parameters
        self._into_encoders(tuned, Prompt(leaf, tuned.null.detach()), share * anchor)
        of_prompts = {
            "loss": error.detach(),
            "chosen": total.gather(1, chosen[:, None])[:, 0],
            "gap": total.amax(dim=1) - total.amin(dim=1),
        }
        # One row a prompt, with its samples.
        return {**{name: v[:, None].expand(-1, self.many) for name, v in of_prompts.items()}, **figures}

    def _drawn(self, rows: Rows) -> list[Drawn]:
        """The rows' images, which are made where they are not at hand: always of so many prompts at once.

        Calls of one size give a prompt the same bits whatever is beside it, so a run that goes on in the middle has
        the images of one that never stopped.
        """
        numbers = [int(index) for index in rows.columns["index"]]
        found = {index: self.made[index] for index in numbers if index in self.made}
        # Of prompts that are fewer than a batch, some are in it twice.
        missing = {index: row for index, row in zip(numbers, rows.split(1), strict=True) if index not in found}
        size = self.weighted.prompts_at_once
        for start in range(0, len(missing), size):
            part = dict(list(missing.items())[start : start + size])
            wanted = [*part.values()]
            padding = wanted[-1:] * (size - len(wanted))
            for index, drawn in zip(part, self._draw(wanted + padding), strict=False):
                found[index] = drawn
                if self.room >= drawn.latents.nbytes:
                    self.made[index], self.room = drawn, self.room - drawn.latents.nbytes
        return [found[index] for index in numbers]

    @torch.no_grad()
    def _draw(self, rows: list[Rows]) -> list[Drawn]:
        """The untrained model's images of some prompts, one row each."""
        prompts = [str(row.columns["prompt"][0]) for row in rows for _ in range(self.many)]
        ids = {name: torch.cat([row.ids(self.diffuser.device)[name] for row in rows]) for name in self.null_ids}
        condition = embed(self.diffuser.encoders, ids)[torch.arange(len(rows)).repeat_interleave(self.many)]
        noise = [
            seeds.normal(self.seed, [int(row.columns["index"][0])], f"noise of sample {k}", self.diffuser.latent_shape)
            for row in rows
            for k in range(self.many)
        ]
        start, steps = State(torch.cat(noise).to(self.diffuser.device)), range(self.base.num_steps)
        final = sample(self.base, start, Prompt(condition, self.null), steps).latents
        self.images = decode(self.diffuser.vae, final, self.diffuser.decoder_precision)
        scores = self.scoring.begin(self.images, prompts)()
        figures = {"total": self.scoring.total(scores), **scores, **measure(self.images, prompts)}
        each = {name: values.unflatten(0, (len(rows), self.many)) for name, values in figures.items()}
        # Copies of latents: what is kept would be a view of the padding's, too.
        return [
            Drawn(latents.clone(), {name: values[i] for name, values in each.items()})
            for i, latents in enumerate(final.unflatten(0, (len(rows), self.many)))
        ]

    def _choose(self, rows: Rows, total: Tensor) -> Tensor:
        """Each prompt's sample k with probability softmax(total / temperature)[k]."""
        shares = (total / self.weighted.temperature).softmax(dim=1).cumsum(dim=1)
        at_random = seeds.uniform(self.seed, rows.position, "choice").to(total.device)
        return (shares < at_random[:, None]).sum(dim=1).clamp(max=self.many - 1)
