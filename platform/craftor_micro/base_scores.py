"""What the referee says of the base model: of its autoencoder's reconstructions and of images it makes from prompts."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from craftor_micro.autoencoder import psnr
from craftor_micro.captions import Description, describe
from craftor_micro.pool import render_pool
from craftor_micro.referee import Referee

NUM_STEPS, GUIDANCE_SCALE, BATCH = 20, 4.0, 25


@torch.no_grad()
def score_autoencoder(autoencoder: AutoencoderTiny, referee: Referee, num: int = 1000) -> dict[str, float]:
    """Share of reconstructions of clean held-out renders that the referee reads wholly right, and their fidelity."""
    pool = render_pool(num, seed=1234, held_out=True)
    rows = torch.arange(num).split(BATCH)
    encoded = [autoencoder.encode(pool.batch(r) * 2 - 1).latents for r in rows]
    images = torch.cat([autoencoder.decode(z).sample / 2 + 0.5 for z in encoded]).clamp(0, 1)
    judged = referee.judge(images, describe(pool.scenes))
    return {"psnr_db": psnr(autoencoder, pool, num=num), "accuracy": judged["accuracy"].mean().item()}


def score_base(pipeline: Path, referee: Path, held_out: Path) -> dict[str, object]:
    """Per attribute, over held-out prompts with one object and with two; images by stock diffusers."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    judge = Referee.load(referee)
    images = []
    for start in range(0, len(rows), BATCH):
        prompts = [row["prompt"] for row in rows[start : start + BATCH]]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        made = pipe(
            prompts,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            output_type="pt",
        ).images
        images.append(made.float())
    descriptions = [Description.from_json(row["description"]) for row in rows]
    judged = judge.judge(torch.cat(images), descriptions)
    single = torch.tensor([len(d.objects) == 1 for d in descriptions])
    return {
        "num_prompts": len(rows),
        "sampler": f"{NUM_STEPS} DDIM steps, guidance {GUIDANCE_SCALE}",
        "one_object": {name: round(values[single].nanmean().item(), 3) for name, values in judged.items()},
        "two_objects": {name: round(values[~single].nanmean().item(), 3) for name, values in judged.items()},
    }
