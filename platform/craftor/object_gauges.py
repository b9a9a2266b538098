"""Held-out objects -> whether an object encoder carries identity, and whether it copies: losses on fixed noise.

They part within minutes of training, while the identity of sampled pictures is still noise. On the object's cells, the
loss given another picture of the same object (`matched`) must lie below that given none, and that below the loss given
a picture of another object (`shuffled`). The copy gap compares references: how much the loss of the whole picture is
higher with another picture of the object than with the target itself. A model that learned identity hardly gains
from the target; one trained on self-pairs does.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from craftor import object_condition, seeds
from craftor.customize import Customizer
from craftor.decode import encode
from craftor.embed import embed
from craftor.statistics import paired
from craftor.tasks.noising import at

LEVELS = (125, 375, 625, 875)
"""Timesteps of 1000 at which each picture is denoised."""


@dataclass(frozen=True)
class HeldOut:
    """Pictures of objects that no training saw; neighbouring rows are of different identities."""

    images: Float[Tensor, "n 3 H W"]
    masks: Float[Tensor, "n 1 H W"]
    captions: list[str]
    others: Float[Tensor, "n 3 H W"]
    """Another picture of each object, cut out."""


@torch.no_grad()
def gauge(customizer: Customizer, held_out: HeldOut, seed: int, batch_size: int = 32) -> dict[str, dict | float]:
    """Mean losses with the paired differences between them (`craftor.statistics.paired`), and the copy gap."""
    itself = object_condition.cut_out(held_out.images, held_out.masks)
    shuffled = held_out.others.roll(1, dims=0)
    references = {"matched": held_out.others, "none": None, "shuffled": shuffled, "itself": itself}
    rows = torch.arange(len(held_out.images)).split(batch_size)
    losses = {
        name: torch.cat([_losses(customizer, held_out, r, None if ref is None else ref[r], seed) for r in rows])
        for name, ref in references.items()
    }
    on_object = {name: found[..., 1].numpy() for name, found in losses.items()}
    whole = {name: found[..., 0].numpy() for name, found in losses.items()}
    return {
        **{f"loss_{name}": float(on_object[name].mean()) for name in ("matched", "none", "shuffled", "itself")},
        "matched_to_none": paired(on_object["matched"], on_object["none"]),
        "none_to_shuffled": paired(on_object["none"], on_object["shuffled"]),
        "copy_gap": float(whole["matched"].mean() / whole["itself"].mean() - 1),
        "itself_to_matched": paired(whole["itself"], whole["matched"]),
    }


def _losses(
    customizer: Customizer, held_out: HeldOut, rows: Tensor, references: Tensor | None, seed: int
) -> Float[Tensor, "b levels 2"]:
    """Squared error of each row at each noise level: over the whole picture, and over the object's cells."""
    diffuser = customizer.diffuser
    latents = encode(diffuser.vae, held_out.images[rows])
    mask = torch.nn.functional.interpolate(held_out.masks[rows], size=latents.shape[2:], mode="area")[:, 0]
    text = embed(diffuser.encoders, diffuser.tokenize([held_out.captions[i] for i in rows.tolist()])).embeds
    seen = customizer.encoder(torch.zeros_like(held_out.images[rows]) if references is None else references)
    seen = torch.zeros_like(seen) if references is None else seen
    found = []
    for level in LEVELS:
        noise = seeds.normal(seed, rows.tolist(), f"gauge {level}", tuple(latents.shape[1:]))
        timesteps = torch.full((len(rows),), level * diffuser.scheduler.config.num_train_timesteps // 1000)
        noisy, target, _ = at(diffuser, latents, noise, timesteps)
        output = customizer.unet(noisy, timesteps, text, added_cond_kwargs={"image_embeds": [seen]}).sample
        squared = (output - target).square().mean(1)
        on_object = (mask * squared).sum((1, 2)) / mask.sum((1, 2))
        found.append(torch.stack([squared.mean((1, 2)), on_object], dim=1))
    return torch.stack(found, dim=1)
