"""Clean renders -> a trained `Referee`, and how often it reads renders wholly right."""

import time

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from craftor.precision import fast_on_cpu
from craftor_micro.augment import augment
from craftor_micro.captions import describe
from craftor_micro.pool import Pool
from craftor_micro.referee import ATTRIBUTES, Referee, targets

SECOND_OBJECT_HEADS = ("shape1", "colour1", "size1", "relation")


def train_referee(
    referee: nn.Module, pool: Pool, *, num_steps: int, batch_size: int = 64, lr: float = 4e-3, seed: int = 0
) -> dict[str, float]:
    """A `Referee`, or what else has its heads; one-cycle learning rate.

    The loss is the cross-entropy of every head that applies plus the squared error of the quality factors.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = targets(pool.scenes)
    referee.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.AdamW(referee.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.15)
    started = time.time()
    for step in range(num_steps):
        rows = torch.randint(len(pool), (batch_size,), generator=generator)
        images = augment(pool.batch(rows), generator).contiguous(memory_format=torch.channels_last)
        with fast_on_cpu():
            outputs = referee(images)
        loss = attribute_loss(outputs, {name: column[rows] for name, column in labels.items()})
        loss = loss + 10 * F.mse_loss(outputs["quality"].float(), pool.scenes.quality[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(f"step {step + 1}/{num_steps} loss {loss:.3f} {time.time() - started:.0f} s", flush=True)
    referee.eval()
    return {"seconds": time.time() - started}


def attribute_loss(outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Summed cross-entropy of every classifying head, over the scenes that it applies to."""
    two = labels["count"] == 1
    total = torch.zeros(())
    for name in labels:
        losses = F.cross_entropy(outputs[name].float(), labels[name], reduction="none")
        applies = two if name in SECOND_OBJECT_HEADS else ~two if name == "position" else torch.ones_like(two)
        total = total + (losses * applies).mean()
    return total


def score_referee(referee: Referee, pool: Pool, *, batch_size: int = 250) -> dict[str, float]:
    """Shares of renders read right, each attribute apart and all together, and the mean absolute quality error."""
    described, rating = describe(pool.scenes), pool.scenes.rating()
    parts = [
        referee.judge(pool.batch(torch.arange(start, end)), described[start:end])
        for start in range(0, len(pool), batch_size)
        for end in [min(start + batch_size, len(pool))]
    ]
    scores = {name: torch.cat([part[name] for part in parts]) for name in (*ATTRIBUTES, "accuracy", "quality")}
    shares = {name: scores[name].mean().item() for name in (*ATTRIBUTES, "accuracy")}
    two = pool.scenes.count == 2
    return {
        **shares,
        "accuracy_one_object": scores["accuracy"][~two].mean().item(),
        "accuracy_two_objects": scores["accuracy"][two].mean().item(),
        "quality_mean_absolute_error": (scores["quality"] - rating).abs().mean().item(),
    }
