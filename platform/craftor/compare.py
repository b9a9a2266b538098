"""Two encoders of one base -> what differs: descriptions, weights by layer, pictures of the same prompts and noise."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from craftor import seeds
from craftor.decode import decode
from craftor.denoise import Prompt, State
from craftor.diffuser import Diffuser
from craftor.embed import embed
from craftor.encoders import Encoder
from craftor.locate import locate
from craftor.mixture import Member, sample_mixture, timesteps
from craftor.pictures import save_sheet
from craftor.rollout import Rollout


def default_prompts() -> list[str]:
    """Four prompts of the micro world's held-out file; any model understands them."""
    lines = Path(locate("micro:held_out.jsonl")).read_text().splitlines()[:4]
    return [json.loads(line)["prompt"] for line in lines]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys of nested descriptions whose values differ, with both; a missing one is None."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*a, *b)):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[f"{prefix}{key}"] = (one, other)
    return found


def distances(a: nn.Module, b: nn.Module) -> dict[str, float]:
    """||a - b|| / ||b|| of the weights in each group: embeddings, each layer, the final norm."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    others = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", name)
        group = f"layer {layer[1]}" if layer else name.removeprefix("text_model.").rpartition(".")[0]
        squares[group][0] += float((parameter.double() - others[name].double()).square().sum())
        squares[group][1] += float(others[name].double().square().sum())
    return {group: (difference / norm) ** 0.5 for group, (difference, norm) in squares.items()}


@torch.no_grad()
def save_grid(
    base: Diffuser, encoders: Sequence[Encoder], prompts: Sequence[str], rollout: Rollout, seed: int, path: Path
) -> None:
    """A PNG with a row for each prompt: the base's image, then each encoder's in its own window, from one noise."""
    guided = base.guided(rollout)
    ids = base.tokenize(list(prompts))
    noise = State(seeds.normal(seed, range(len(prompts)), "compare", base.latent_shape).to(base.device))
    original = Prompt(embed(base.encoders, ids), base.null())
    columns: list[list[Member]] = [[]]
    for encoder in encoders:
        standing_in = {**base.encoders, **encoder.modules}
        acts = timesteps(encoder.window)
        inside = [index for index, step in enumerate(guided.schedule) if step.timestep in acts]
        steps = range(inside[0], inside[-1] + 1) if inside else range(0)
        columns.append([Member(Prompt(embed(standing_in, ids), base.null(standing_in)), 1.0, steps)])
    images = [
        decode(base.vae, sample_mixture(guided, noise, original, members, range(guided.num_steps)).latents)
        for members in columns
    ]
    save_sheet(torch.stack(images, dim=1).flatten(0, 1), path, columns=len(columns))
