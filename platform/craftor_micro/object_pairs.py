"""What an object encoder learns from, made by the renderer: a Ray Data job that writes Parquet, as `pairs` does.

Domain rows are a view of an object, as latents with its mask, its scene's caption, and a cut-out *other* view of it as
reference; general rows are captioned renders of `world`, without an object. The two alternate in a fixed pattern, so
that any batch holds the same share of each. Columns are those of `craftor.tasks.object_encoder`.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from jaxtyping import Bool
from torch import Tensor
from transformers import CLIPTokenizer

from craftor_micro.identity_training import draw_identities
from craftor_micro.object_render import NEUTRAL, cut_out, render_views
from craftor_micro.objects import sample_views, scene_captions
from craftor_micro.pool import captions
from craftor_micro.render import IMAGE_SIZE, render
from craftor_micro.tokenizer import MAX_LENGTH
from craftor_micro.world import sample_scenes

CHUNK = 240
"""Rows made at once: a multiple of all small batch sizes."""
TWO_OBJECTS = 0.2
UNSAID = "an object"


class EncodeObjects:
    """Chunk number -> its rows; everything in a chunk follows from (seed, chunk number).

    With `self_pairs` the reference is the target itself, cut out: the copying that other views are there to prevent.
    Without `described` the captions of objects' scenes say nothing: `UNSAID` stands for each.
    """

    def __init__(self, pipeline: str, seed: int, domain_share: float, self_pairs: bool, described: bool = True) -> None:
        torch.set_num_threads(1)
        self.seed, self.self_pairs, self.described = seed, self_pairs, described
        self.domain = alternating(CHUNK, domain_share)
        self.tokenizer = CLIPTokenizer.from_pretrained(f"{pipeline}/tokenizer")
        self.vae = AutoencoderTiny.from_pretrained(f"{pipeline}/vae", dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        chunk = int(row["id"])
        seed = self.seed * 1_000_000 + 10 * chunk
        domain = self.domain
        images = torch.zeros(CHUNK, 3, IMAGE_SIZE, IMAGE_SIZE)
        masks, references = torch.zeros(CHUNK, 1, IMAGE_SIZE, IMAGE_SIZE), torch.zeros_like(images)
        images[domain], masks[domain], references[domain], said = self._domain(int(domain.sum()), seed)
        scenes = sample_scenes(CHUNK - len(said), seed + 5, two_objects=TWO_OBJECTS)
        images[~domain] = render(scenes, seed + 6)
        texts = {True: iter(said), False: iter(captions(scenes, seed + 7, clean=False))}
        prompts = [next(texts[bool(has)]) for has in domain]
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_LENGTH).input_ids
        latents = self.vae.encode(images * 2 - 1).latents * self.vae.config.scaling_factor
        columns = {
            "input_ids": np.array(ids, dtype=np.int32),
            "latents": latents.flatten(1).numpy().astype(np.float16),
            "mask": F.avg_pool2d(masks, IMAGE_SIZE // latents.shape[-1]).flatten(1).numpy().astype(np.float16),
            "reference": (references * 255).round().to(torch.uint8).flatten(1).numpy(),
        }
        return [
            {
                "index": chunk * CHUNK + i,
                "prompt": prompts[i],
                "domain": bool(domain[i]),
                **{name: values[i] for name, values in columns.items()},
            }
            for i in range(CHUNK)
        ]

    def _domain(self, num: int, seed: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Targets, masks, references and captions."""
        identity = draw_identities(num, seed, held_out=False)
        views = sample_views(identity, seed + 1)
        target = render_views(views, seed + 2)
        shown = target if self.self_pairs else render_views(sample_views(identity, seed + 3), seed + 4)
        generator = torch.Generator().manual_seed(seed + 8)
        # Half on the neutral fill of inference, half on any colour, lest the fill be learned.
        neutral = torch.rand(num, 1, generator=generator) < 0.5
        fill = torch.where(neutral, torch.tensor(NEUTRAL), torch.rand(num, 3, generator=generator))
        return (
            target.images,
            target.masks,
            cut_out(shown, fill),
            scene_captions(views, seed) if self.described else [UNSAID] * num,
        )


def alternating(num: int, share: float) -> Bool[Tensor, " num"]:
    """A pattern with `share` of its places true, evenly spread. Raises ValueError where that is no whole number."""
    if abs(num * share - round(num * share)) > 1e-6:
        raise ValueError(f"a share of {share} of {num} rows is not a whole number of them")
    place = torch.arange(num + 1, dtype=torch.float64)
    return (place * share + 1e-9).floor().diff() > 0


def write_object_pairs(
    pipeline: Path,
    out: Path,
    *,
    num: int,
    seed: int,
    domain_share: float = 0.5,
    self_pairs: bool = False,
    described: bool = True,
    num_workers: int = 2,
) -> None:
    """Write `num` rows (a multiple of 240) in order of their index."""
    if num % CHUNK:
        raise ValueError(f"num = {num}: allowed are multiples of {CHUNK}")
    alternating(CHUNK, domain_share)
    shutil.rmtree(out, ignore_errors=True)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.range(num // CHUNK, override_num_blocks=max(1, num // CHUNK // 10)).flat_map(
        EncodeObjects,
        fn_constructor_args=(str(pipeline.resolve()), seed, domain_share, self_pairs, described),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
    )
    rows.write_parquet(str(out))
