"""Captioned renders -> a sharp CLIP: InfoNCE with hard negatives, helped by two auxiliary losses on the image tower.

A transformer on patches is slow to see outlines from captions alone, so the tower first learns to name attributes from
linear heads that are then thrown away. Captions never mention quality, so a purely contrastive tower forgets it: one
linear map from the embedding to ratings keeps it there for the aesthetic head (`ratings.py`), trained afterwards.
Attention is `eager`, and arithmetic bfloat16 where the CPU multiplies it: 2.4 times the images a second of fused
attention in float32 on one that does.
"""

import random
import time

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPModel, CLIPTokenizer

from craftor.precision import fast_on_cpu
from craftor_micro.augment import augment
from craftor_micro.captions import describe
from craftor_micro.contrastive import normalise
from craftor_micro.hard_negatives import REPLACED, caption_with_negatives
from craftor_micro.pool import Pool
from craftor_micro.referee import HEADS, targets
from craftor_micro.referee_training import attribute_loss
from craftor_micro.tokenizer import MAX_LENGTH

MAX_LOGIT_SCALE = 4.6
"""Logarithm of 100, CLIP's own bound."""


class Teacher(nn.Module):
    """The auxiliary losses, from what the renderer knows: attributes by the pooled output, ratings by the embedding."""

    def __init__(self, clip: CLIPModel, pool: Pool, ratings: Float[Tensor, " n"] | None) -> None:
        super().__init__()
        self.labels, self.ratings = targets(pool.scenes), ratings
        self.classify = nn.Linear(clip.config.vision_config.hidden_size, sum(HEADS.values()))
        self.rate = nn.Linear(clip.config.projection_dim, 1)

    def forward(self, rows: Tensor, pooled: Float[Tensor, "b width"], image: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        outputs = dict(zip(HEADS, self.classify(pooled).split(list(HEADS.values()), dim=1), strict=True))
        loss = attribute_loss(outputs, {name: column[rows] for name, column in self.labels.items()})
        if self.ratings is None:
            return loss
        rated = 10 * self.rate(image).squeeze(-1)  # embeddings are unit vectors: ten of them span the ratings
        return loss + 0.3 * F.mse_loss(rated, self.ratings[rows] - 5)


def train_vision(
    clip: CLIPModel,
    teacher: Teacher,
    pool: Pool,
    *,
    num_steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> None:
    """The image tower alone on the auxiliary losses: half the price of a contrastive step, and a denser signal."""
    generator = torch.Generator().manual_seed(seed)
    vision = [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]
    optimizer, schedule = _optimizer([*vision, *teacher.parameters()], lr, num_steps)
    clip.set_attn_implementation("eager")
    clip.train()
    started = time.time()
    for step in range(num_steps):
        rows = torch.randint(len(pool), (batch_size,), generator=generator)
        with fast_on_cpu():
            loss = teacher(rows, *embed_images(clip, augment(pool.batch(rows), generator)))
        _update(optimizer, schedule, loss)
        if step % 100 == 99:
            print(f"vision step {step + 1}/{num_steps} loss {loss:.3f} {time.time() - started:.0f} s", flush=True)
    clip.eval()


def train_contrast(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    teacher: Teacher,
    pool: Pool,
    *,
    num_steps: int,
    batch_size: int = 64,
    num_negatives: int = 2,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> None:
    """Each image against the batch's captions and its own wrong ones, the auxiliary losses kept at a lower weight."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    described = describe(pool.scenes)
    optimizer, schedule = _optimizer([*clip.parameters(), *teacher.parameters()], lr, num_steps)
    clip.set_attn_implementation("eager")
    clip.train()
    started = time.time()
    for step in range(num_steps):
        rows = torch.randint(len(pool), (batch_size,), generator=generator)
        attributes = [rng.sample(REPLACED, num_negatives) for _ in range(batch_size)]
        captions = [
            caption_with_negatives(described[i], a, rng) for i, a in zip(rows.tolist(), attributes, strict=True)
        ]
        with fast_on_cpu():
            pooled, image = embed_images(clip, augment(pool.batch(rows), generator))
            text = embed_captions(clip, tokenizer, [caption for versions in captions for caption in versions])
            taught = teacher(rows, pooled, image)
        text = text.view(batch_size, 1 + num_negatives, -1)
        loss, metrics = contrast(clip.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(), image, text[:, 0], text[:, 1:])
        _update(optimizer, schedule, loss + 0.3 * taught)
        if step % 50 == 49:
            shown = " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(
                f"clip step {step + 1}/{num_steps} {shown} taught {taught:.3f} {time.time() - started:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    clip.eval()


def _optimizer(parameters: list[nn.Parameter], lr: float, num_steps: int) -> tuple[AdamW, OneCycleLR]:
    optimizer = AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    return optimizer, OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)


def _update(optimizer: AdamW, schedule: OneCycleLR, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()


def embed_images(
    clip: CLIPModel, images: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, "b width"], Float[Tensor, "b d"]]:
    """The tower's pooled output, and unit vectors in CLIP's joint space, of images in [0, 1]."""
    pooled = clip.vision_model(pixel_values=normalise(images)).pooler_output
    return pooled, F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def embed_captions(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Float[Tensor, "c d"]:
    """Unit vectors with gradient."""
    ids = tokenizer(captions, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt").input_ids
    return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def contrast(
    scale: Tensor, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], negatives: Float[Tensor, "b k d"]
) -> tuple[Tensor, dict[str, float]]:
    """Symmetric InfoNCE, image rows also against their own negatives, plus each pair of true and wrong caption."""
    targets = torch.arange(len(image))
    logits = scale * image @ text.T
    own = scale * torch.einsum("bd,bkd->bk", image, negatives)
    true = logits.diagonal()[:, None]
    pairs = F.softplus(own - true).mean()
    loss = (F.cross_entropy(torch.cat([logits, own], 1), targets) + F.cross_entropy(logits.T, targets)) / 2 + pairs
    recall = (logits.argmax(1) == targets).float().mean().item()
    return loss, {"loss": loss.item(), "recall": recall, "hard": (true > own).float().mean().item()}
