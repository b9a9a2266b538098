"""Captioned renders as training pairs: a Ray Data job that renders, encodes and writes Parquet.

Columns: `index`, `prompt` (as careless as the web's), `input_ids`, `latents` (float16, flattened, already multiplied
by the autoencoder's scaling factor).
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTokenizer

from craftor_micro.pool import captions
from craftor_micro.render import render
from craftor_micro.tokenizer import MAX_LENGTH
from craftor_micro.world import sample_scenes

CHUNK = 250
TWO_OBJECTS = 0.2


class EncodeChunk:
    """Chunk number -> 250 rows; everything in a chunk follows from (seed, chunk number)."""

    def __init__(self, pipeline: str, seed: int) -> None:
        torch.set_num_threads(1)
        self.seed = seed
        self.tokenizer = CLIPTokenizer.from_pretrained(f"{pipeline}/tokenizer")
        self.vae = AutoencoderTiny.from_pretrained(f"{pipeline}/vae").eval()

    @torch.no_grad()
    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        chunk = int(row["id"])
        seed = self.seed * 1_000_000 + chunk
        scenes = sample_scenes(CHUNK, seed, two_objects=TWO_OBJECTS)
        prompts = captions(scenes, seed, clean=False)
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_LENGTH).input_ids
        latents = self.vae.encode(render(scenes, seed) * 2 - 1).latents * self.vae.config.scaling_factor
        flat = latents.flatten(1).numpy().astype(np.float16)
        return [
            {"index": chunk * CHUNK + i, "prompt": prompts[i], "input_ids": np.int32(ids[i]), "latents": flat[i]}
            for i in range(CHUNK)
        ]


def write_pairs(pipeline: Path, out: Path, *, num: int, seed: int, num_workers: int = 2) -> None:
    """Write `num` pairs (a multiple of 250) in order of their index."""
    if num % CHUNK:
        raise ValueError(f"num = {num}: allowed are multiples of {CHUNK}")
    shutil.rmtree(out, ignore_errors=True)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    rows = ray.data.range(num // CHUNK, override_num_blocks=max(1, num // CHUNK // 20)).flat_map(
        EncodeChunk,
        fn_constructor_args=(str(pipeline.resolve()), seed),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
    )
    rows.write_parquet(str(out))
