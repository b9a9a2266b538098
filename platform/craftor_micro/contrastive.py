"""A small CLIP trained contrastively on captioned renders: the base's text tower and, apart, the rewards' CLIPs."""

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from craftor_micro.pool import Pool
from craftor_micro.tokenizer import MAX_LENGTH

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(tokenizer: CLIPTokenizer, *, width: int = 128, num_layers: int = 3) -> CLIPModel:
    """A `CLIPModel` for 64-pixel images in 8-pixel patches; token ids end with the first end-of-text token."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
    }
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": width,
    }
    vision = {**tower, "image_size": 64, "patch_size": 8, "projection_dim": width}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = images.new_tensor(CLIP_MEAN), images.new_tensor(CLIP_STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def train_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pool: Pool,
    captions: Sequence[str],
    *,
    num_steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Symmetric InfoNCE over the batch (Radford et al. 2021); lr warms up and falls as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    targets = torch.arange(batch_size)
    started, hits = time.time(), []
    clip.train()
    for step in range(num_steps):
        rows = torch.randint(len(pool), (batch_size,), generator=generator)
        logits = clip(input_ids=ids[rows], pixel_values=normalise(pool.batch(rows))).logits_per_image
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        hits.append((logits.argmax(1) == targets).float().mean().item())
        if step % 50 == 49:
            print(f"clip step {step + 1}/{num_steps}: loss {loss:.3f}, recall@1 {sum(hits[-50:]) / 50:.3f}")
    clip.eval()
    return {"train_recall_at_1": sum(hits[-50:]) / 50, "seconds": time.time() - started}
