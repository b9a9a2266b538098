"""Captioned renders -> a sharp CLIP: InfoNCE with hard negatives, helped by two auxiliary losses on the image tower.

Linear heads on the pooled output name the attributes (a transformer on patches is slow to see outlines from captions
alone), and are thrown away. Captions never mention quality, so a purely contrastive tower forgets it: one linear map
from the embedding to ratings keeps it there for the aesthetic head (`ratings.py`), which is trained afterwards.
Attention is `eager` and arithmetic bfloat16: 2.4 times the images a second of fused attention in float32 on a CPU.
"""

import random
import time

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from craftor_micro.augment import augment
from craftor_micro.captions import describe
from craftor_micro.contrastive import normalise
from craftor_micro.hard_negatives import REPLACED, caption_with_negatives
from craftor_micro.pool import Pool
from craftor_micro.referee import HEADS, targets
from craftor_micro.referee_training import attribute_loss
from craftor_micro.tokenizer import MAX_LENGTH


def train_reward_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pool: Pool,
    ratings: Float[Tensor, " n"] | None,
    *,
    num_steps: int,
    batch_size: int = 64,
    num_negatives: int = 2,
    lr: float = 2e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Each image against the batch's captions and its own wrong ones; `ratings` in [0, 10], or None to learn none."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    described = describe(pool.scenes)
    labels = targets(pool.scenes)
    rate = nn.Linear(clip.config.projection_dim, 1)
    classify = nn.Linear(clip.config.vision_config.hidden_size, sum(HEADS.values()))
    parameters = [*clip.parameters(), *rate.parameters(), *classify.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    started, metrics = time.time(), {}
    clip.set_attn_implementation("eager")
    clip.train()
    for step in range(num_steps):
        rows = torch.randint(len(pool), (batch_size,), generator=generator)
        attributes = [rng.sample(REPLACED, num_negatives) for _ in range(batch_size)]
        captions = [caption_with_negatives(described[i], a, rng) for i, a in zip(rows.tolist(), attributes, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            pooled, image = embed_images(clip, augment(pool.batch(rows), generator))
            text = embed_captions(clip, tokenizer, [caption for versions in captions for caption in versions])
            outputs = dict(zip(HEADS, classify(pooled).split(list(HEADS.values()), dim=1), strict=True))
        text = text.view(batch_size, 1 + num_negatives, -1)
        loss, metrics = contrast(clip.logit_scale.clamp(max=4.6).exp(), image, text[:, 0], text[:, 1:])
        named = attribute_loss(outputs, {name: column[rows] for name, column in labels.items()})
        loss, metrics["attributes"] = loss + 0.3 * named, named.item()
        if ratings is not None:
            rated = 10 * rate(image).squeeze(-1)  # embeddings are unit vectors: ten of them span the ratings
            loss = loss + 0.1 * F.mse_loss(rated, ratings[rows] - 5)
            metrics["rating_mse"] = F.mse_loss(rated, ratings[rows] - 5).item()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            shown = " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"clip step {step + 1}/{num_steps} {shown} {time.time() - started:.0f} s", flush=True)
    with torch.no_grad():
        clip.logit_scale.clamp_(max=4.6)
    clip.eval()
    return metrics


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
