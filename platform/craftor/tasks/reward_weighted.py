"""Prompts -> images of the untrained model -> one of each prompt's, the likelier the better -> denoising loss.

For what a reward's gradient does not reach: early steps decide what is drawn, and the gradient of a score through all
later ones says little about it; that some of a prompt's images are right says it plainly. Reward-weighted regression
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
from craftor.tasks.sampled import SampledTask

KEPT_BYTES = 1 << 30
"""Of latents that a worker keeps: prompts beyond that are drawn again whenever their turn comes."""


@dataclass(frozen=True)
class Drawn:
    """What the untrained model makes of one prompt: its samples' latents, their totals, and what is logged of them."""

    latents: Tensor
    total: Tensor
    figures: dict[str, Tensor]


class RewardWeightedTask(SampledTask):
    """What a prompt's images are follows from the prompt alone: they are made once, and again after a restart."""

    def __init__(
        self, recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None
    ) -> None:
        assert isinstance(recipe.task, RewardWeighted)
        super().__init__(recipe, device, elsewhere)
        self.weighted = recipe.task
        steps = draw(self.weighted.window, self.guided.num_steps, 0.0, 0.0).steps
        self.timesteps = torch.tensor([self.guided.schedule[index].timestep for index in steps])
        drawn_in = self.weighted.drawn_in or self.guided.num_steps
        self.base = self.diffuser.guided(self.weighted.rollout.model_copy(update={"num_steps": drawn_in}))
        self.null = self.diffuser.null()
        self.made: dict[int, Drawn] = {}
        self.room = KEPT_BYTES

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        drawn = [self._drawn(row) for row in rows.split(1)]
        original, tuned = self._embed(rows)
        anchor = self.settings.anchor * (tuned.condition.embeds - original.condition.embeds).square().mean()
        total = torch.stack([of.total for of in drawn])
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
        figures = {name: torch.stack([of.figures[name] for of in drawn]) for name in drawn[0].figures}
        of_prompts = {
            "loss": error.detach(),
            "chosen": total.gather(1, chosen[:, None])[:, 0],
            "gap": total.amax(dim=1) - total.amin(dim=1),
        }
        # One row a prompt, with its samples.
        return {**{name: v[:, None].expand(-1, self.many) for name, v in of_prompts.items()}, "total": total, **figures}

    def _drawn(self, row: Rows) -> Drawn:
        """A single prompt's images, by itself: so they do not depend, in any bit, on the prompts beside it."""
        index = int(row.columns["index"][0])
        if index not in self.made:
            found = self._draw(index, row)
            size = found.latents.nbytes
            if self.room < size:
                return found
            self.made[index], self.room = found, self.room - size
        return self.made[index]

    @torch.no_grad()
    def _draw(self, index: int, row: Rows) -> Drawn:
        prompts, shape = [str(row.columns["prompt"][0])] * self.many, self.diffuser.latent_shape
        condition = embed(self.diffuser.encoders, row.ids(self.diffuser.device))
        noise = [seeds.normal(self.seed, [index], f"noise of sample {k}", shape) for k in range(self.many)]
        start = State(torch.cat(noise).to(self.diffuser.device))
        prompt, steps = self.each(Prompt(condition, self.null)), range(self.base.num_steps)
        final = sample(self.base, start, prompt, steps).latents
        self.images = decode(self.diffuser.vae, final, self.diffuser.decoder_precision)
        scores = self.scoring.begin(self.images, prompts)()
        return Drawn(final, self.scoring.total(scores), {**scores, **measure(self.images, prompts)})

    def _choose(self, rows: Rows, total: Tensor) -> Tensor:
        """Each prompt's sample k with probability softmax(total / temperature)[k]."""
        shares = (total / self.weighted.temperature).softmax(dim=1).cumsum(dim=1)
        at_random = seeds.uniform(self.seed, rows.position, "choice").to(total.device)
        return (shares < at_random[:, None]).sum(dim=1).clamp(max=self.many - 1)
