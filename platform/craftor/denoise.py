"""Embeddings and noise -> latents: guided DDIM steps, and their exact gradient one step at a time.

The chain is cut at every step. Forward keeps the latents; backward walks the steps from the last to the first of the
window and carries dL/dz through each by a vector-Jacobian product. That is plain backpropagation through time, but a
step's graph can be rebuilt when its turn comes (`recompute`), so memory need not grow with the window.
"""

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Guided:
    """A UNet with its schedule and classifier-free guidance: one call of `step` is one denoising step."""

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    guidance_scale: float
    bf16: bool = False
    """Run the UNet's arithmetic in bfloat16; latents and schedule stay in float32."""

    @property
    def num_steps(self) -> int:
        return len(self.scheduler.timesteps)

    def step(
        self,
        latents: Float[Tensor, "b c h w"],
        embeds: Float[Tensor, "b n d"],
        null: Float[Tensor, "1 n d"],
        index: int,
    ) -> Float[Tensor, "b c h w"]:
        """Denoising step `index` (0 is the noisiest) under guidance w: `eps = eps_null + w * (eps - eps_null)`."""
        timestep = self.scheduler.timesteps[index]
        if self.guidance_scale == 1:
            guided = self._predict(latents, timestep, embeds)
        else:
            both = torch.cat([null.expand_as(embeds), embeds])
            unconditional, conditional = self._predict(torch.cat([latents, latents]), timestep, both).chunk(2)
            guided = unconditional + self.guidance_scale * (conditional - unconditional)
        return self.scheduler.step(guided, timestep, latents).prev_sample

    def _predict(self, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.bf16):
            return self.unet(latents, timestep, embeds).sample.to(latents.dtype)


@torch.no_grad()
def sample(
    guided: Guided,
    latents: Float[Tensor, "b c h w"],
    embeds: Float[Tensor, "b n d"],
    null: Float[Tensor, "1 n d"],
    steps: range,
) -> Float[Tensor, "b c h w"]:
    """Run denoising steps without gradient."""
    for index in steps:
        latents = guided.step(latents, embeds, null, index)
    return latents


@dataclass
class Chain:
    """The part of a rollout that carries gradient: from the window's first step to the last step of the schedule.

    Steps inside `window` see the trained embeddings; steps after it see `after` (the original ones) and only pass
    the gradient on to earlier latents.
    """

    guided: Guided
    embeds: Float[Tensor, "b n d"]
    null: Float[Tensor, "1 n d"]
    after: tuple[Tensor, Tensor]
    window: range
    recompute: bool

    def __post_init__(self) -> None:
        # Leaves of their own: the encoder's graph is entered once, after the whole chain has been walked.
        self.embeds = self.embeds.detach().requires_grad_()
        self.null = self.null.detach().requires_grad_()
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Final latents, a leaf whose `.grad` the decoder and the rewards fill."""
        for index in range(self.window.start, self.guided.num_steps):
            self._inputs.append(latents.detach().requires_grad_())
            with torch.set_grad_enabled(not self.recompute):
                output = self._step(index)
            self._outputs.append(output)
            latents = output
        return latents.detach().requires_grad_()

    def backward(self, gradient: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "1 n d"]]:
        """From dL/d(final latents) to dL/d(embeddings) and dL/d(null embedding), summed over the window."""
        total, total_null = torch.zeros_like(self.embeds), torch.zeros_like(self.null)
        for index in reversed(range(self.window.start, self.guided.num_steps)):
            kept = self._outputs.pop()
            if self.recompute:
                with torch.enable_grad():
                    kept = self._step(index)
            latents = self._inputs.pop()
            leaves = [latents, self.embeds, self.null] if index in self.window else [latents]
            gradient, *by_embeds = torch.autograd.grad(kept, leaves, gradient, allow_unused=True)
            if by_embeds:
                total += by_embeds[0]
                total_null += by_embeds[1] if by_embeds[1] is not None else 0
        return total, total_null

    def _step(self, index: int) -> Tensor:
        embeds, null = (self.embeds, self.null) if index in self.window else self.after
        return self.guided.step(self._inputs[index - self.window.start], embeds, null, index)
