"""Image gradients of several rewards -> one: weights, running scales, conflicts; and how far the rewards agree.

Each reward's gradient with respect to the images is known by itself (see `scoring`), so that agreement costs no further
call of a reward. Gradients here are those of the loss: every sign is turned alike, which no cosine or norm shows.
"""

from collections.abc import Mapping
from functools import reduce
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from craftor import objective
from craftor.task_settings import Composition as Settings

Images = Float[Tensor, "b 3 H W"]
_SMALL = 1e-30
_LEAST_SPREAD = 1e-3
"""Share of a score's mean that its standard deviation is taken to be at least: a constant score says nothing."""


class Composition:
    """What each reward counts for, from step to step.

    Running means move in `observe`, once a step and from the whole batch, which is the same on every worker; so the
    factors of a step follow from the steps before it, and `state` holds all that a resumed run needs.
    """

    def __init__(self, settings: Settings, weights: Mapping[str, float]) -> None:
        self.settings, self.weights = settings, dict(weights)
        self.running: dict[str, float] = {}

    @property
    def needs_start(self) -> bool:
        """Whether factors depend on running means of which there are none yet."""
        return self.settings.moves and not self.running

    def factors(self) -> dict[str, float]:
        """d(total)/d(score) of each trained reward in this step."""
        if not self.running:
            return self.weights
        if self.settings.normalise:
            return {name: weight / self._spread(name) for name, weight in self.weights.items()}
        if self.settings.weights == "equal_shares":
            norms = {name: max(self.running[f"norm/{name}"], _SMALL) for name in self.weights}
            length = sum(weight * norms[name] for name, weight in self.weights.items()) / len(self.weights)
            return {name: length / norm for name, norm in norms.items()}
        return self.weights

    def total(self, scores: Mapping[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
        """The objective of each image, in this step's factors; normalised scores are less their running mean."""
        if self.settings.normalise and self.running:
            scores = {name: scores[name] - self.running[f"mean/{name}"] for name in self.weights}
        return objective.total(scores, self.factors())

    def combine(self, gradients: Mapping[str, Images]) -> Images:
        """The rewards' weighted gradients as one."""
        if self.settings.conflicts == "pcgrad":
            return pcgrad(gradients)
        return reduce(torch.add, gradients.values())

    def agreement(self, gradients: Mapping[str, Images], *, step: int, share: float) -> dict[str, Float[Tensor, " b"]]:
        """Per image: cosines and shares where a report is due, and the norms that equal shares follow from.

        gradients: of `share` times the batch's mean loss, weighted.
        """
        metrics: dict[str, Tensor] = {}
        if len(gradients) > 1 and step % self.settings.report_every == 0:
            metrics = {**cosines(gradients), **shares(gradients)}
        if self.settings.weights == "equal_shares":
            factors = self.factors()
            for name, gradient in gradients.items():
                metrics[f"norm/{name}"] = _norm(gradient) * (len(gradient) / (share * factors[name]))
        return metrics

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """The whole batch's metrics, into the running means; returns the factors that the batch was scored with."""
        if not self.settings.moves:
            return {}
        used = {f"factor/{name}": factor for name, factor in self.factors().items()}
        seen = {}
        for name in self.weights:
            scores = metrics[name].double()
            seen[f"mean/{name}"], seen[f"square/{name}"] = scores.mean().item(), scores.square().mean().item()
            if f"norm/{name}" in metrics:
                seen[f"norm/{name}"] = metrics[f"norm/{name}"].double().mean().item()
        kept = self.settings.smoothing if self.running else 0.0
        self.running = {key: kept * self.running.get(key, 0.0) + (1 - kept) * value for key, value in seen.items()}
        return used

    def state(self) -> dict[str, float]:
        return dict(self.running)

    def restore(self, state: Mapping[str, float]) -> None:
        self.running = dict(state)

    def _spread(self, name: str) -> float:
        mean, square = self.running[f"mean/{name}"], self.running[f"square/{name}"]
        return max(max(square - mean**2, 0.0) ** 0.5, _LEAST_SPREAD * abs(mean), _SMALL)


def pcgrad(gradients: Mapping[str, Images]) -> Images:
    """Sum of the gradients, each without what opposes another: g_i - min(0, <g_i, g_j>) / |g_j|^2 g_j, image by image.

    Yu et al. 2020, algorithm 1, but that a reward meets the others in the recipe's order instead of a random one, so
    that a step depends on nothing else; with two rewards it makes no difference.
    """
    flat = {name: gradient.flatten(1) for name, gradient in gradients.items()}
    projected = []
    for name, own in flat.items():
        for other in (gradient for key, gradient in flat.items() if key != name):
            product = (own * other).sum(1, keepdim=True)
            own = own - product.clamp(max=0) / other.square().sum(1, keepdim=True).clamp(min=_SMALL) * other
        projected.append(own)
    return reduce(torch.add, projected).view_as(next(iter(gradients.values())))


def cosines(gradients: Mapping[str, Images]) -> dict[str, Float[Tensor, " b"]]:
    """`cosine/A/B` for every two rewards: -1 where they pull an image in opposite directions, 0 for a zero gradient."""
    pairs = combinations(gradients.items(), 2)
    return {f"cosine/{a}/{b}": F.cosine_similarity(x.flatten(1), y.flatten(1), eps=_SMALL) for (a, x), (b, y) in pairs}


def shares(gradients: Mapping[str, Images]) -> dict[str, Float[Tensor, " b"]]:
    """`share/A`: a weighted gradient's norm over the sum of all rewards' norms, before conflicts are dropped."""
    norms = {name: _norm(gradient) for name, gradient in gradients.items()}
    whole = reduce(torch.add, norms.values()).clamp(min=_SMALL)
    return {f"share/{name}": norm / whole for name, norm in norms.items()}


def _norm(gradient: Images) -> Float[Tensor, " b"]:
    return gradient.flatten(1).norm(dim=1)
