"""How many of the window's steps keep their graph, and how many are rebuilt: memory against one more forward pass."""

import torch
from torch import Tensor

from craftor.decode import decode
from craftor.denoise import Guided, Prompt
from craftor.diffuser import Diffuser
from craftor.memory import graph_size, resident_bytes
from craftor.rollout import Window
from craftor.scoring import Scoring


def kept_steps(window: Window, num_steps: int) -> int | None:
    """How many of the last denoising steps keep their graph; None where that is to be measured (`auto`)."""
    if window.recompute == "auto":
        return None
    if isinstance(window.recompute, bool):
        return 0 if window.recompute else num_steps
    return max(0, len(window.span(num_steps)) - window.recompute)


def measure_kept_steps(
    limit_gib: float,
    guided: Guided,
    diffuser: Diffuser,
    scoring: Scoring,
    latents: Tensor,
    tuned: Prompt,
    prompts: list[str],
    index: int,
) -> int:
    """The most steps whose graphs fit in `limit_gib` beside the decoder's and the largest reward's, measured.

    `latents` are a real batch at denoising step `index`; nothing of the graphs is kept.
    """
    with torch.enable_grad():
        with graph_size(guided.unet.parameters()) as step:
            guided.output(latents.detach().requires_grad_(), tuned, guided.schedule[index].timestep)
        with graph_size(diffuser.vae.parameters()) as decoding:
            images = decode(diffuser.vae, latents.detach().requires_grad_(), diffuser.decoder_precision)
        scored = [0]
        for reward in scoring.rewards.values():
            with graph_size(reward.parameters()) as score:  # type: ignore[attr-defined]  # a Module, as it has gradient
                reward(images.detach().requires_grad_(), prompts)
            scored.append(score.bytes)
    room = limit_gib * 2**30 - resident_bytes(diffuser.device) - decoding.bytes - max(scored)
    return max(0, int(room // max(step.bytes, 1)))
