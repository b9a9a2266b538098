"""The untuned model as a method, and the noise by which other methods are paired with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from craftor import seeds
from craftor.decode import decode
from craftor.denoise import Prompt, State, sample
from craftor.diffuser import Diffuser
from craftor.embed import embed
from craftor.rollout import Rollout

Method = Callable[[Sequence[str], Sequence[int], int], Float[Tensor, "b 3 H W"]]
"""(prompts, their numbers, seed) -> images in [0, 1]. Number and seed stand for the noise, as in `evaluate`."""


@dataclass(frozen=True)
class Base:
    """A pipeline's own images. Draw 0 has the noise of `evaluate`, so that methods are compared in pairs."""

    diffuser: Diffuser
    rollout: Rollout
    run_seed: int

    def __call__(
        self, prompts: Sequence[str], numbers: Sequence[int], seed: int, draw: int = 0
    ) -> Float[Tensor, "b 3 H W"]:
        """One of any number of draws of noise for each (number, seed)."""
        again = f" draw {draw}" if draw else ""
        shape = self.diffuser.latent_shape
        noise = [seeds.normal(self.run_seed, [seed], f"evaluation {number}{again}", shape) for number in numbers]
        return self._images(list(prompts), torch.cat(noise).to(self.diffuser.device))

    @torch.no_grad()
    def _images(self, prompts: list[str], noise: Tensor) -> Tensor:
        guided = self.diffuser.guided(self.rollout)
        prompt = Prompt(embed(self.diffuser.encoders, self.diffuser.tokenize(prompts)), self.diffuser.null())
        final = sample(guided, State(noise), prompt, range(guided.num_steps))
        return decode(self.diffuser.vae, final.latents)
