"""Synthetic choices between two images of one prompt -> a CLIP with PickScore's loss (Kirstain et al. 2023, section 4).

One image is what the prompt says; the other has another quality and, half of the time, a wrong attribute. A noisy
judge weighs mistakes against quality. This reward is for evaluation only: other renders, other seeds and other
initial weights than the reward CLIP's.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from craftor.precision import fast_on_cpu
from craftor_micro.augment import augment
from craftor_micro.captions import describe
from craftor_micro.hard_negatives import REPLACED
from craftor_micro.pool import Pool, captions
from craftor_micro.referee import ATTRIBUTES, canonical, compare
from craftor_micro.render import render
from craftor_micro.reward_clip import embed_captions, embed_images
from craftor_micro.world import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scenes, sample_scenes, with_quality

MISTAKE_COST, RATING_WORTH = 2.5, 0.6
"""Log-odds of one wrong attribute and of one point of rating: a mistake weighs about as much as four points."""


@dataclass(frozen=True)
class Choices:
    prompts: list[str]
    first: Pool
    second: Pool
    advantage: Float[Tensor, " n"]
    """True utility of the first image above the second's, in log-odds."""
    chosen_first: Float[Tensor, " n"]
    """What the noisy judge chose: 1 or 0."""


def sample_choices(num: int, seed: int, *, held_out: bool = False) -> Choices:
    generator = torch.Generator().manual_seed(seed + 1)
    scenes = sample_scenes(num, seed, held_out=held_out)
    spoilt = torch.rand(num, generator=generator) < 0.5
    rivals = with_quality(spoil(scenes, spoilt, generator), torch.rand(num, 3, generator=generator))
    mistakes = [
        sum(compare(canonical(seen), said)[name] == 0 for name in ATTRIBUTES)
        for seen, said in zip(describe(rivals), describe(scenes), strict=True)
    ]
    advantage = MISTAKE_COST * torch.tensor(mistakes) + RATING_WORTH * (scenes.rating() - rivals.rating())
    chosen_first = torch.bernoulli(advantage.sigmoid(), generator=generator)
    first, second = render_scenes(scenes, seed + 2), render_scenes(rivals, seed + 3)
    return Choices(captions(scenes, seed + 4, clean=True), first, second, advantage, chosen_first)


def spoil(scenes: Scenes, rows: Tensor, generator: torch.Generator) -> Scenes:
    """One attribute replaced in the scenes of `rows`, a mask; held-out scenes stay held out, all others not."""
    num = len(scenes)
    kind = torch.randint(len(REPLACED), (num,), generator=generator)
    which = torch.randint(2, (num,), generator=generator) * (scenes.count == 2)

    def turn(column: Tensor, size: int, name: str) -> Tensor:
        turned = (column + 1 + torch.randint(size - 1, column.shape, generator=generator)) % size
        hit = rows & (kind == REPLACED.index(name))
        if column.ndim == 2:
            hit = hit[:, None] & (torch.arange(2) == which[:, None])
        return torch.where(hit, turned, column)

    changed = replace(
        scenes,
        shape=turn(scenes.shape, len(SHAPES), "shape"),
        colour=turn(scenes.colour, len(COLOURS), "colour"),
        background=turn(scenes.background, len(BACKGROUNDS), "background"),
        texture=turn(scenes.texture, len(TEXTURES), "texture"),
    )
    # A place and a size that fit the canvas come from another scene with as many objects.
    donor = torch.arange(num)
    for count in (1, 2):
        same = (scenes.count == count).nonzero().squeeze(1)
        donor[same] = same[torch.randperm(len(same), generator=generator)]
    moved = rows & ((kind == REPLACED.index("size")) | (kind == REPLACED.index("position")))
    donor = torch.where(moved & (scenes.held_out() == changed.held_out()), donor, torch.arange(num))
    columns = {name: getattr(scenes, name)[donor] for name in ("layout", "center", "radius", "size")}
    changed = replace(changed, **columns)
    stayed = changed.held_out() == scenes.held_out()
    repaired = {
        name: torch.where(
            stayed.view(-1, *[1] * (getattr(scenes, name).ndim - 1)), getattr(changed, name), getattr(scenes, name)
        )
        for name in ("shape", "colour", "background")
    }
    return replace(changed, **repaired)


def render_scenes(scenes: Scenes, seed: int) -> Pool:
    chunks = torch.arange(len(scenes)).split(256)
    images = [
        (render(scenes[rows], seed * 1_000_003 + i) * 255).round().to(torch.uint8) for i, rows in enumerate(chunks)
    ]
    return Pool(scenes, torch.cat(images))


def train_on_choices(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    choices: Choices,
    *,
    num_steps: int,
    batch_size: int = 64,
    lr: float = 6e-4,
    seed: int = 0,
) -> None:
    """Cross-entropy of the judge's choice under a softmax over the two images' scores."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    clip.set_attn_implementation("eager")
    clip.train()
    started = time.time()
    for step in range(num_steps):
        rows = torch.randint(len(choices.prompts), (batch_size,), generator=generator)
        images = torch.cat([choices.first.batch(rows), choices.second.batch(rows)])
        with fast_on_cpu():
            _, image = embed_images(clip, augment(images, generator))
            text = embed_captions(clip, tokenizer, [choices.prompts[i] for i in rows.tolist()])
        scores = clip.logit_scale.exp() * (image.view(2, batch_size, -1) * text).sum(-1)
        loss = F.binary_cross_entropy_with_logits(scores[0] - scores[1], choices.chosen_first[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            right = ((scores[0] > scores[1]) == (choices.advantage[rows] > 0)).float().mean()
            print(
                f"choices step {step + 1}/{num_steps} loss {loss:.3f} right {right:.3f} {time.time() - started:.0f} s",
                flush=True,
            )
    clip.eval()


@torch.no_grad()
def score_choices(first: Float[Tensor, " n"], second: Float[Tensor, " n"], choices: Choices) -> dict[str, float]:
    """How often the scores agree with the noisy judge, with the truth, and with the truth that the judge used."""
    prefers = first > second
    right = prefers == (choices.advantage > 0)
    spoilt = choices.advantage - RATING_WORTH * (choices.first.scenes.rating() - choices.second.scenes.rating()) > 1
    return {
        "agreement_with_judge": (prefers == (choices.chosen_first == 1)).float().mean().item(),
        "agreement_judge_with_truth": ((choices.chosen_first == 1) == (choices.advantage > 0)).float().mean().item(),
        "agreement_with_truth": right.float().mean().item(),
        "agreement_with_truth_quality_alone": right[~spoilt].float().mean().item(),
        "agreement_with_truth_with_mistake": right[spoilt].float().mean().item(),
    }
