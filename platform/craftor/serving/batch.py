"""Rows that differ in everything but their latents' shape -> one padded UNet call, and each row a step further.

Timestep, guidance, solver coefficients and embeddings are all tensors with one entry a row, so nothing needs to be
equal for rows to share a call. A row takes one slot of it, two under guidance, three where an object guides apart; the
rest is padding. The arithmetic is that of `Guided.step` (and with an object that of `craftor.customize`): a row's bits
depend on the size of the call and on nothing else in it.
"""

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from craftor.denoise import Guided
from craftor.diffuser import Diffuser
from craftor.embed import Condition
from craftor.rollout import Rollout
from craftor.serving.control import ControlNet
from craftor.serving.work import Row


def network(base: Diffuser, latent_shape: tuple[int, int, int]) -> Guided:
    """The UNet alone, without guidance, for latents of one shape: `output` is then its plain call."""
    plain = base.guided(Rollout(num_steps=1, guidance_scale=1))
    if plain.time_ids is None:
        return plain
    height, width = (side * base.pixels_per_latent for side in latent_shape[1:])
    size = [height, width, 0, 0, height, width]
    return replace(plain, time_ids=torch.tensor([size], dtype=torch.float32, device=base.device))


@torch.inference_mode()
def advance(unet: Guided, rows: Sequence[Row], bucket: int, controlnet: ControlNet | None = None) -> float:
    """Take each row's next denoising step in one UNet call of `bucket` slots; returns the call's seconds."""
    prompts = [row.prompt() for row in rows]
    guided = [i for i, row in enumerate(rows) if row.request.slots > 1]
    apart = [i for i in guided if rows[i].request.slots == 3]
    padding = bucket - len(rows) - len(guided) - len(apart)
    assert padding >= 0, f"{len(rows)} rows of which {len(guided)} are guided do not fit in {bucket} slots"
    slots = [*range(len(rows)), *guided, *apart, *[0] * padding]

    latents = torch.stack([row.latents for row in rows])
    condition = _stack(
        [p.condition for p in prompts]
        + [prompts[i].null for i in (*guided, *apart)]
        + [prompts[0].condition] * padding,
        unet.precision,
    )
    more: dict[str, Any] = {}
    if shown := [row.request.shown for row in rows if row.request.shown is not None]:
        unet = replace(unet, unet=shown[0].encoder.unet)
        sees = [row.sees() for row in rows]
        each = [*sees, *[None] * len(guided), *(sees[i] for i in apart), *[None] * padding]
        none = torch.zeros_like(next(row.seen for row in rows if row.seen is not None))
        condition = replace(condition, image=torch.cat([none if one is None else one for one in each]))
        if shown[0].regions is not None:  # then every row has some
            places = [one.regions for one in shown if one.regions is not None]
            masks = torch.stack([places[i] for i in slots]).to(latents)
            more = {"cross_attention_kwargs": {"ip_adapter_masks": [masks]}}
    steps = [row.schedule[row.index] for row in rows]
    timesteps = torch.tensor([steps[i].timestep for i in slots], device=latents.device)

    started = perf_counter()
    given = latents[slots]
    if controlnet is not None:
        controls = [rows[i].request.control for i in slots]
        more |= controlnet.residuals(unet, controls, given, condition, timesteps)
    out = unet.call(given, timesteps, condition, **more)
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)  # so that the seconds are the call's, and rows join the step that runs
    seconds = perf_counter() - started

    output, unconditional, object_alone, _ = out.split([len(rows), len(guided), len(apart), padding])
    if guided:
        output = _guide(rows, guided, output, unconditional, apart, object_alone)
    p, q, keep, new, old = (
        _column([getattr(s, name) for s in steps], latents) for name in ("p", "q", "keep", "new", "old")
    )
    x0 = p * latents + q * output
    following = keep * latents + new * x0
    if any(step.old for step in steps):
        following = following + old * torch.stack([row.previous for row in rows])
    for row, after, clean in zip(rows, following, x0, strict=True):
        row.index += 1
        if row.kept is not None:
            after = row.kept.put_back(after, row.schedule[row.index] if row.remaining else None)
        row.latents, row.previous = after, clean
    return seconds


def _stack(conditions: Sequence[Condition], precision: torch.dtype) -> Condition:
    """In the UNet's precision: autocast would round the same embeddings anew, to the same bits, in every attention."""
    together = Condition(*(torch.cat(tensors) for tensors in zip(*(c.tensors for c in conditions), strict=True)))
    return replace(together, embeds=together.embeds.to(precision))


def _guide(
    rows: Sequence[Row],
    guided: Sequence[int],
    output: Tensor,
    unconditional: Tensor,
    apart: Sequence[int],
    object_alone: Tensor,
) -> Tensor:
    """The guided rows' outputs in place of their conditional ones.

    `null + w (text - null)`; where an object guides apart, `null + o (object - null) + w (text and object - object)`.
    """
    below = unconditional.clone()
    start = unconditional.clone()
    if apart:
        places = [guided.index(i) for i in apart]
        weight = _column([_object_weight(rows[i]) for i in apart], output)
        start[places] = unconditional[places] + weight * (object_alone - unconditional[places])
        below[places] = object_alone
    scale = _column([rows[i].request.guidance_scale for i in guided], output)
    output = output.clone()
    output[guided] = start + scale * (output[guided] - below)
    return output


def _object_weight(row: Row) -> float:
    assert row.request.shown is not None
    return row.request.shown.weight


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)
