"""Timesteps and the solvers' arithmetic: each denoising step is a linear map of latents and network outputs.

With alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), the network's output gives `x0 = p * latents + q * output`, and

    next latents = keep * latents + new * x0 + old * (x0 of the step before)

whose five numbers per step hold all that a solver is. So the gradient through a solver needs no autograd, its state is
one tensor instead of a mutable scheduler, and every solver ends at the same noise level, that of the first training
timestep. The numbers are those of diffusers' own schedulers (tests compare each step).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One denoising step's coefficients."""

    timestep: int
    alpha: float
    sigma: float
    p: float
    q: float
    keep: float
    new: float
    old: float

    def x0(self, latents: Tensor, output: Tensor) -> Tensor:
        """The clean latents that the network's output means."""
        return self.p * latents + self.q * output

    def advance(self, latents: Tensor, x0: Tensor, previous: Tensor | None) -> Tensor:
        """Latents of the next noise level; `previous` is the last step's x0, which multistep solvers read."""
        following = self.keep * latents + self.new * x0
        return following + self.old * previous if self.old and previous is not None else following


Schedule = tuple[Step, ...]


def schedule(scheduler: SchedulerMixin, solver: str, num_steps: int) -> Schedule:
    """`num_steps` steps on the `trailing` grid: of 1000 timesteps, 25 steps are 999, 959, ..., 39.

    Raises ValueError for an unknown solver, more steps than timesteps, or a prediction type that cannot start from
    this scheduler's noisiest level.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver '{solver}'; available: {', '.join(SOLVERS)}")
    config, abar = scheduler.config, scheduler.alphas_cumprod.double()
    if not 1 <= num_steps <= len(abar):
        raise ValueError(f"num_steps = {num_steps}: allowed are 1 to {len(abar)}, the model's timesteps")
    timesteps = trailing(len(abar), num_steps)
    levels = torch.cat([abar[timesteps], abar[:1]])
    alpha, sigma = levels.sqrt().tolist(), (1 - levels).sqrt().tolist()
    if alpha[0] == 0 and config.prediction_type == "epsilon":
        raise ValueError("a schedule that starts from zero signal needs v prediction, but this model predicts noise")
    read = OUTPUTS[config.prediction_type]
    weigh = SOLVERS[solver]
    return tuple(
        Step(int(t), alpha[i], sigma[i], *read(alpha[i], sigma[i]), *weigh(alpha, sigma, i))
        for i, t in enumerate(timesteps)
    )


def begun_at(steps: Schedule, index: int) -> Schedule:
    """A schedule of which only the steps from `index` on are taken: the first of them knows no step before it."""
    if index == 0:
        return steps
    first = steps[index]
    return (*steps[:index], replace(first, new=first.new + first.old, old=0.0), *steps[index + 1 :])


def trailing(num_timesteps: int, num_steps: int) -> list[int]:
    """The noisiest timestep and every `num_timesteps / num_steps`-th below it."""
    return [int(t) - 1 for t in np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps))][:num_steps]


OUTPUTS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "epsilon": lambda a, s: (1 / a, -s / a),
    "v_prediction": lambda a, s: (a, -s),
    "sample": lambda a, s: (0.0, 1.0),
}
"""(p, q) of `x0 = p * latents + q * output`, by what the network predicts."""


def ddim(alpha: list[float], sigma: list[float], i: int) -> tuple[float, float, float]:
    """Keep the predicted noise, lower its level (Song et al. 2021, eta 0): Euler for z / alpha in sigma / alpha."""
    keep = sigma[i + 1] / sigma[i]
    return keep, alpha[i + 1] - alpha[i] * keep, 0.0


def dpm_solver_2m(alpha: list[float], sigma: list[float], i: int) -> tuple[float, float, float]:
    """DPM-Solver++(2M): x0 extrapolated from the last two in log-SNR (Lu et al. 2022); short chains end first-order."""
    keep, new, _ = ddim(alpha, sigma, i)
    last = i == len(sigma) - 2 and len(sigma) - 1 < 15
    if i == 0 or last:
        return keep, new, 0.0
    before, here, after = (math.log(alpha[j] / sigma[j]) if alpha[j] else -math.inf for j in (i - 1, i, i + 1))
    half = (after - here) / (here - before) / 2  # 0 after an infinite first stride
    return keep, new * (1 + half), -new * half


SOLVERS: dict[str, Callable[[list[float], list[float], int], tuple[float, float, float]]] = {
    "ddim": ddim,
    "euler": ddim,
    "dpm_solver_2m": dpm_solver_2m,
}
"""(keep, new, old) of step i. Euler in sigma is DDIM in other variables: the same numbers, under both names."""


def add_noise(step: Step, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Clean latents at the noise level of a step."""
    return step.alpha * x0 + step.sigma * noise
