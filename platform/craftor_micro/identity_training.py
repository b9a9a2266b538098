"""Renders of training identities -> a trained `IdentityScorer`, and how well it tells held-out ones apart."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from craftor.precision import fast_on_cpu
from craftor_micro.augment import augment
from craftor_micro.identity import IdentityScorer
from craftor_micro.object_render import cut_out, render_views
from craftor_micro.objects import IDENTITY, Views, identities, near_identical, sample_views

CHUNK = 250


@dataclass(frozen=True)
class ObjectPool:
    """Rendered views in memory; a third of them cut out on a fill of a random colour."""

    views: Views
    images: UInt8[Tensor, "n 3 64 64"]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor) -> Float[Tensor, "b 3 64 64"]:
        return self.images[rows].float() / 255


def draw_identities(num: int, seed: int, *, held_out: bool) -> Tensor:
    """`num` numbers of identities, each as often as any other as far as that divides."""
    known = identities(held_out=held_out)
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(known), generator=generator) for _ in range(-(-num // len(known)))]
    return known[torch.cat(rounds)[:num]]


def render_object_pool(num: int, seed: int, *, held_out: bool = False) -> ObjectPool:
    """Views of training or held-out identities; some 1.5 ms each on one core."""
    views = sample_views(draw_identities(num, seed, held_out=held_out), seed)
    generator = torch.Generator().manual_seed(seed + 3)
    images = torch.empty(num, 3, 64, 64, dtype=torch.uint8)
    for start in range(0, num, CHUNK):
        rows = slice(start, start + CHUNK)
        rendered = render_views(views[rows], seed=seed * 1_000_003 + start)
        alone = cut_out(rendered, torch.rand(len(rendered.images), 3, generator=generator))
        third = torch.rand(len(alone), 1, 1, 1, generator=generator) < 1 / 3
        images[rows] = (torch.where(third, alone, rendered.images) * 255).round().to(torch.uint8)
    return ObjectPool(views, images)


def train_identity_scorer(
    scorer: IdentityScorer, pool: ObjectPool, *, num_steps: int, batch_size: int = 64, lr: float = 4e-3, seed: int = 0
) -> None:
    """Cross-entropy of every attribute; one-cycle learning rate."""
    generator = torch.Generator().manual_seed(seed)
    labels = pool.views.attributes()
    scorer.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.15)
    started = time.time()
    for step in range(num_steps):
        rows = torch.randint(len(pool), (batch_size,), generator=generator)
        images = augment(pool.batch(rows), generator).contiguous(memory_format=torch.channels_last)
        with fast_on_cpu():
            outputs = scorer(images)
        loss = torch.stack([F.cross_entropy(outputs[name].float(), labels[name][rows]) for name in IDENTITY]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(f"identity step {step + 1}/{num_steps} loss {loss:.3f} {time.time() - started:.0f} s", flush=True)
    scorer.eval()


@torch.no_grad()
def score_identity_scorer(scorer: IdentityScorer, num: int, seed: int) -> dict[str, float]:
    """On `num` views of held-out identities: attributes read right, and choices between the same and nearly the same.

    `near_identical`: a cut-out reference, another view of its identity, and that same view of an object that differs
    in one attribute or in having its colours swapped; how often the former scores above the latter.
    """
    identity = draw_identities(num, seed, held_out=True)
    references, views = sample_views(identity, seed), sample_views(identity, seed + 10)
    others = near_identical(views, seed + 20)
    attributes = views.attributes()
    found: dict[str, list[Tensor]] = {}
    for start in range(0, num, CHUNK):
        rows = slice(start, start + CHUNK)
        reference = cut_out(render_views(references[rows], seed + start))
        same, other = (render_views(v[rows], seed + start).images for v in (views, others))
        judged = scorer.judge(same, {name: column[rows] for name, column in attributes.items()})
        won = scorer.same(same, reference) > scorer.same(other, reference)
        for name, values in {**judged, "near_identical": won.float()}.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values).mean().item() for name, values in found.items()}
