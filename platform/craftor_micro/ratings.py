"""Synthetic ratings of renders -> the aesthetic head on a frozen CLIP's image embedding.

A rater sees the true quality of a scene and adds noise, as people do (the mean of LAION's or AVA's raters is no
cleaner). Nothing but the rating is told: which factors make it is for the head to find.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from craftor_micro.augment import augment
from craftor_micro.pool import Pool
from craftor_micro.world import Scenes
from craftor_rewards.aesthetic import Head
from craftor_rewards.clip import ClipTowers

RATING_NOISE = 0.8
"""Standard deviation of one rating, of 10; true ratings have 1.7."""


def rate(scenes: Scenes, seed: int) -> Float[Tensor, " b"]:
    """One noisy rating in [0, 10] per scene."""
    noise = torch.randn(len(scenes), generator=torch.Generator().manual_seed(seed))
    return (scenes.rating() + RATING_NOISE * noise).clamp(0, 10)


@torch.no_grad()
def image_embeddings(towers: ClipTowers, pool: Pool, generator: torch.Generator | None) -> Float[Tensor, "n d"]:
    """Unit vectors of every image; with a generator, of slightly blurred and noisy ones."""
    parts = []
    for rows in torch.arange(len(pool)).split(250):
        images = pool.batch(rows)
        parts.append(towers.image_features(images if generator is None else augment(images, generator)))
    return torch.cat(parts)


def train_head(
    features: Float[Tensor, "n d"], ratings: Float[Tensor, " n"], *, hidden: int, num_steps: int, seed: int
) -> Head:
    """A GELU perceptron with one hidden layer, squared error, starting at the mean rating."""
    generator = torch.Generator().manual_seed(seed)
    head = Head([features.shape[1], hidden, 1], "gelu")
    with torch.no_grad():
        first, last = head.layers[0], head.layers[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        first.weight.mul_(4)  # unit vectors have small entries: let the first layer see them
        last.bias.fill_(ratings.mean())
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=num_steps)
    for _ in range(num_steps):
        rows = torch.randint(len(features), (512,), generator=generator)
        loss = F.mse_loss(head(features[rows]), ratings[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval().requires_grad_(False)


def score_head(head: Head, features: Float[Tensor, "n d"], scenes: Scenes) -> dict[str, float]:
    """Correlation with, and mean absolute difference from, the true rating, and the correlation with each factor."""
    scores, truth = head(features), scenes.rating()
    factors = {
        f"correlation_{name}": correlation(scores, scenes.quality[:, i])
        for i, name in enumerate(("vividness", "shading", "shadow"))
    }
    return {
        "correlation": correlation(scores, truth),
        "mean_absolute_error": (scores - truth).abs().mean().item(),
        **factors,
    }


def correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
