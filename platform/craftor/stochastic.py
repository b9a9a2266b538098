"""DDIM with noise of its own: each denoising step is a draw from a Gaussian whose density is known, so it is a policy.

From noise level (alpha, sigma) to the next, (alpha', sigma'), Song et al. 2021 (equations 12 and 16) draw

    next latents ~ N(mean, d^2),   mean = alpha' x0 + sqrt(sigma'^2 - d^2) * (latents - alpha x0) / sigma,
    d = eta * sigma' / sigma * sqrt(1 - alpha^2 / alpha'^2)

so the mean is again a linear map of latents and x0 (see `solver`), and eta = 0 is DDIM itself. The last step ends at
the first training timestep, where sigma' > 0: every step has a density. Log-probabilities are sums over a sample's
latents, as the joint density of independent numbers is, and not means: a ratio of densities is then what it says.
"""

import math
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from craftor.solver import Step

Latents = Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class NoisyStep:
    """The step to the mean, and the standard deviation around it."""

    step: Step
    deviation: float

    def mean(self, latents: Latents, output: Latents) -> Latents:
        """Where the network's output leads on average."""
        return self.step.advance(latents, self.step.x0(latents, output), None)


def noisy(step: Step, eta: float) -> NoisyStep:
    """A DDIM step with noise: eta 0 adds none, eta 1 as much as the forward process took away."""
    following = step.keep * step.sigma
    alpha = math.sqrt(1 - following**2)
    deviation = eta * step.keep * math.sqrt(1 - (step.alpha / alpha) ** 2)
    keep = math.sqrt(max(following**2 - deviation**2, 0.0)) / step.sigma
    return NoisyStep(replace(step, keep=keep, new=alpha - step.alpha * keep), deviation)


def log_prob(sample: Latents, mean: Latents, deviation: float) -> Float[Tensor, " b"]:
    """log N(sample; mean, deviation^2), summed over each sample's latents."""
    constant = math.log(deviation) + 0.5 * math.log(2 * math.pi)
    return (-((sample - mean) ** 2) / (2 * deviation**2) - constant).flatten(1).sum(1)


def log_ratio(mean: Latents, old_mean: Latents, noise: Latents, deviation: float) -> Float[Tensor, " b"]:
    """log_prob under `mean` less log_prob under `old_mean`, of the sample `old_mean + deviation * noise`.

    In this form nothing large cancels: the difference of two sums over thousands of latents would be all rounding.
    """
    moved = (mean - old_mean) / deviation
    return (moved * noise - moved**2 / 2).flatten(1).sum(1)


def divergence(mean: Latents, base_mean: Latents, deviation: float) -> Float[Tensor, " b"]:
    """KL(N(mean, d^2) || N(base_mean, d^2)) of one step (DPOK, Fan et al. 2023)."""
    return (((mean - base_mean) / deviation) ** 2 / 2).flatten(1).sum(1)
