"""A registered object encoder beside the base model: the UNet that its rows call, and what they show it.

Where the encoder left the base's UNet as it was, its own shares the base's weights, and a row without an object has the
bits of the base there: such rows and those with one object share calls. A tuned UNet is another network, so its rows
have calls of their own, and pictures without an object stay the base's.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float
from torch import Tensor

from craftor import object_adapter, object_condition, registry, trainable
from craftor.description import OBJECT_ENCODER
from craftor.diffuser import Diffuser, freeze, load
from craftor.encoders import EncoderRefused, Version, fetch, of_the_machine
from craftor.object_condition import ImageEncoder
from craftor.prefix_cache import weights_digest
from craftor.recipe import Model
from craftor.rollout import Rollout
from craftor.serving.shelf import Resolve, Shelf

ON_THE_SHELF = "object_encoder"
"""Its name there, and in the settings."""


@dataclass(frozen=True, eq=False)
class ObjectEncoder:
    """One version of an object encoder, frozen and on the base's device."""

    name: str
    version: str | None
    """None for a bundle that came from a folder."""
    uri: str
    sha256: str
    """Of the weights."""
    run_id: str | None
    description: dict[str, Any]
    """`encoder.toml`."""
    unet: UNet2DConditionModel
    """With the object's cross-attention."""
    images: ImageEncoder
    shares_calls: bool
    """Whether a row without an object is, in this UNet, the base's to the bit."""

    def hold_rounded(self, base: Diffuser) -> None:
        """Store the UNet's own weights as the base's are stored; those that it shares are already."""
        replace(base, unet=self.unet).hold_rounded()


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture of an object, cut out and as the image encoder takes it; of its files only hashes are left."""

    pixels: Float[Tensor, "3 size size"]
    hashes: Mapping[str, str]
    """sha256 of its files, by what they are: `image`, `mask`, `region`."""


@dataclass(frozen=True, eq=False)
class Shown:
    """The object of a request, and how it guides."""

    encoder: ObjectEncoder
    references: tuple[Reference, ...]
    """Pictures of one object, whose tokens stand side by side, as in a stock pipeline; with regions, of several."""
    weight: float
    """Of guidance by the object; see `craftor.customize`."""
    from_step: int = 0
    """The first denoising step that sees it."""
    regions: Float[Tensor, "n H W"] | None = None
    """For each reference 1 where it may be seen in the picture and 0 elsewhere; None for everywhere."""

    @cached_property
    def seen(self) -> Float[Tensor, "1 n *tokens d"]:
        """What the image encoder makes of the references: once a request, each by itself, for the same bits always."""
        return torch.cat([self.encoder.images.see(one.pixels[None]) for one in self.references], dim=1)

    @property
    def company(self) -> tuple[str, int, bool] | None:
        """What rows of one UNet call must have in common; None where any may share it."""
        count, placed = len(self.references), self.regions is not None
        return None if self.encoder.shares_calls and count == 1 and not placed else (self.encoder.sha256, count, placed)


def object_encoders(model: Model, base: Diffuser, source: str | None, resolve: Resolve | None) -> Shelf[ObjectEncoder]:
    """The object encoder served and its later versions, or none; `base` is of `model`, rounded or not.

    Raises what `load_object_encoder` and `resolve` raise.
    """

    def read(found: Version | Path) -> ObjectEncoder:
        encoder = load_object_encoder(found, base, load(model, base.device))
        encoder.hold_rounded(base)
        return encoder

    return Shelf(read, {} if source is None else {ON_THE_SHELF: source}, resolve)


def load_object_encoder(found: Version | Path, base: Diffuser, whole: Diffuser | None = None) -> ObjectEncoder:
    """Load a registered version or a bundle's folder beside its base.

    `whole` is the base as it is on disk, where `base` has been rounded. Raises what `fetch` raises, and EncoderRefused
    where anything is amiss; OSError and torch.OutOfMemoryError are the machine's, and the bundle may do later.
    """
    whole = whole or base
    folder = fetch(found) if isinstance(found, Version) else found
    uri = found.uri if isinstance(found, Version) else str(folder.resolve())
    registry.verify_bundle(folder)
    description = registry.description_of(folder)
    if description.get("kind") != OBJECT_ENCODER:
        raise EncoderRefused(f"object_encoder = {uri!r}: a text encoder; those are served by [encoders]")
    for part in ("text_encoder", "unet"):
        if weights_digest([getattr(whole, part)]) != description["base"].get(f"{part}_sha256"):
            wanted = description["base"]["model"]
            raise EncoderRefused(f"object_encoder = {uri!r}: made for the {part} of {wanted}; this base has another")
    try:
        unet, images, tuned = _networks(folder, base, whole)
    except (OSError, RuntimeError, ValueError) as error:
        if of_the_machine(error):
            raise
        raise EncoderRefused(f"object_encoder = {uri!r}: {error}") from None
    same = _probe(unet, images, base, uri)
    return ObjectEncoder(
        found.name if isinstance(found, Version) else description["name"],
        found.version if isinstance(found, Version) else None,
        uri,
        registry.weights_sha256(folder),
        found.run_id if isinstance(found, Version) else description.get("lineage", {}).get("run_id"),
        description,
        unet,
        images,
        same and not tuned,
    )


def _networks(folder: Path, base: Diffuser, whole: Diffuser) -> tuple[UNet2DConditionModel, ImageEncoder, bool]:
    """A UNet with the adapter, the image encoder, and whether the UNet was tuned."""
    state = object_adapter.read(folder / object_adapter.FILE)
    images = object_condition.load(folder / object_condition.FOLDER, object_adapter.tokens_of(state), base.device)
    tuned = any((folder / name).is_dir() for name in ("unet", trainable.LORA_FOLDER))
    unet: Any = trainable.load(whole, folder)["unet"] if tuned else copy.deepcopy(whole.unet)
    kernels = set(map(type, base.unet.attn_processors.values()))
    object_adapter.install(unet, object_adapter.with_null(state), eager=kernels == {AttnProcessor})
    freeze(unet).to(base.device)
    if not tuned:
        _share_weights(unet, base.unet)
    return unet, images, tuned


def _share_weights(unet: UNet2DConditionModel, base: UNet2DConditionModel) -> None:
    """Those that both have are then in memory once; not before, for an adapter takes its precision from its UNet."""
    for name, module in base.named_modules():
        unet.get_submodule(name)._parameters.update(module._parameters)


@torch.inference_mode()
def _probe(unet: UNet2DConditionModel, images: ImageEncoder, base: Diffuser, uri: str) -> bool:
    """Whether no object is the base to the bit, beside a grey one. Raises EncoderRefused for numbers not finite."""
    seen = images(torch.full((1, 3, 8, 8), object_condition.NEUTRAL, device=base.device))
    plain = base.guided(Rollout(num_steps=1, guidance_scale=1))
    text = base.null()[torch.zeros(2, dtype=torch.long)]
    latents = torch.zeros((2, *base.latent_shape), device=base.device)
    image = torch.cat([seen, torch.zeros_like(seen)])
    found = replace(plain, unet=unet).call(latents, 0, replace(text, image=image))
    if not found.isfinite().all():
        raise EncoderRefused(f"object_encoder = {uri!r}: gives numbers that are not finite")
    return torch.equal(found[1], plain.call(latents, 0, text)[1])
