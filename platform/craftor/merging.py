"""Tuned encoders of one base -> one encoder whose weights are the weighted sum of theirs.

Mixing in weight space, `theta = theta_base + sum_i w_i (theta_i - theta_base)`: one encoder to run instead of several,
no longer the same function as the mixture of outputs, and with one window instead of each member's own.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from craftor import __version__, registry
from craftor.diffuser import Diffuser
from craftor.encoders import Encoder, EncoderRefused
from craftor.mixture import check_weights, timesteps


def merge(base: Diffuser, members: Sequence[tuple[Encoder, float]], name: str, out: Path) -> Path:
    """Write the merged encoder's bundle to `out`; the base has the weight that the members leave.

    Its window spans those of its members. Raises EncoderRefused where they tune different parts, MixtureError for
    weights outside [0, 1] or summing to more than 1, BundleError for a name that cannot be registered.
    """
    registry.check_name(name)
    encoders = [encoder for encoder, _ in members]
    parts = list(encoders[0].modules)
    for encoder in encoders:
        if list(encoder.modules) != parts:
            raise EncoderRefused(
                f"{encoder.uri} tunes {', '.join(encoder.modules)}, {encoders[0].uri} {', '.join(parts)}"
            )
    window = max(encoder.window[0] for encoder in encoders), min(encoder.window[1] for encoder in encoders)
    check_weights([(weight, timesteps(window)) for _, weight in members])
    for part in parts:
        merged = copy.deepcopy(base.encoders[part])
        merged.load_state_dict(_sum(merged.state_dict(), [(e.modules[part].state_dict(), w) for e, w in members]))
        merged.save_pretrained(out / part, safe_serialization=True)
    description = {
        "name": name,
        "craftor": __version__,
        "base": encoders[0].description["base"],
        "merged": [{"uri": e.uri, "sha256": e.sha256, "weight": w} for e, w in members],
        "window": {"first_timestep": window[0], "last_timestep": window[1]},
    }
    return registry.seal(out, base, description)


@torch.no_grad()
def _sum(
    base: Mapping[str, torch.Tensor], members: Sequence[tuple[Mapping[str, torch.Tensor], float]]
) -> dict[str, torch.Tensor]:
    left = 1 - sum(weight for _, weight in members)
    return {key: sum((weight * state[key] for state, weight in members), left * value) for key, value in base.items()}
