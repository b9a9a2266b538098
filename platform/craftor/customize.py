"""One picture of an object and prompts -> new pictures of that object, in one pass of its encoder.

Text and object are guided apart. With e(text, object) the network's output and 0 for the empty prompt and no object,

    output = e(0, 0)  +  object_weight * (e(0, o) - e(0, 0))  +  text_weight * (e(t, o) - e(0, o))

which is three calls a step; equal weights are the two calls of ordinary guidance, and of a stock pipeline.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from craftor import checkpoint, object_adapter, object_condition, registry, tracking, trainable
from craftor.attention import eager_is_faster, set_attention
from craftor.decode import decode
from craftor.denoise import Prompt
from craftor.description import OBJECT_ENCODER
from craftor.diffuser import Diffuser, freeze
from craftor.diffuser import load as load_diffuser
from craftor.embed import embed
from craftor.encoders import Encoder, EncoderRefused, fetch, load_encoder, resolve
from craftor.mixture import Member, check_weights, prompt_at, timesteps
from craftor.object_condition import ImageEncoder
from craftor.prefix_cache import weights_digest
from craftor.recipe import Model, ObjectEncoder, RecipeError, load_run
from craftor.solver import schedule

RUNS = Path("runs")
"""Whose registry is asked without MLFLOW_TRACKING_URI."""


@dataclass(frozen=True)
class Guidance:
    num_steps: int = 20
    text_weight: float = 4.0
    object_weight: float = 4.0
    """0 leaves the object out."""
    object_from: int = 0
    """First denoising step that sees the object: later ones leave layout to the text."""


@dataclass(frozen=True)
class Customizer:
    """A base model with a trained object encoder."""

    diffuser: Diffuser
    unet: UNet2DConditionModel
    """Its own, with the adapter installed."""
    encoder: ImageEncoder
    mixture: tuple[tuple[Encoder, float], ...] = ()
    """Tuned text encoders that read the prompt, each at its own timesteps, and their weights; the base has the rest."""

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        references: Float[Tensor, "b 3 H W"] | Sequence[Float[Tensor, "b 3 _ _"]] | None,
        noise: Float[Tensor, "b c h w"],
        guidance: Guidance = Guidance(),  # noqa: B008  # it is frozen
        regions: Float[Tensor, "k H W"] | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """One picture a row, of its prompt and its cut-out reference; None for no object at all.

        Several references, each a tensor with a row a picture, are several objects or views of one. `regions` says for
        each of them where in the picture it may be seen, 1 or 0 for a pixel; without, they are seen everywhere.
        """
        several = [references] if isinstance(references, Tensor) else references or [noise.new_zeros(1, 3, 1, 1)]
        assert len(prompts) == len(noise) and (references is None or {len(r) for r in several} == {len(noise)})
        assert regions is None or len(regions) == len(several)
        base, members = self._prompts(prompts)
        shown = torch.cat([self.encoder(reference) for reference in several], dim=1)
        masks = None if regions is None else {"ip_adapter_masks": [regions[None].to(noise)]}
        absent = torch.zeros_like(shown).expand(len(noise), *shown.shape[1:])
        latents, x0 = noise, None
        for index, step in enumerate(schedule(self.diffuser.scheduler, "ddim", guidance.num_steps)):
            on = references is not None and guidance.object_weight != 0 and index >= guidance.object_from
            seen = shown if on else absent
            condition, empty = prompt_at(base, members, step.timestep)
            text, null = condition.embeds, empty.embeds.expand_as(condition.embeds)
            apart = on and guidance.object_weight != guidance.text_weight
            conditions = [(null, absent), *([(null, seen)] if apart else []), (text, seen)]
            outputs = self._outputs(latents, step.timestep, conditions, masks)
            weights = (guidance.object_weight, guidance.text_weight) if apart else (guidance.text_weight,)
            output = outputs[0]
            for weight, before, after in zip(weights, outputs, outputs[1:], strict=False):
                output = output + weight * (after - before)
            previous, x0 = x0, step.x0(latents, output)
            latents = step.advance(latents, x0, previous)
        return decode(self.diffuser.vae, latents)

    def _prompts(self, prompts: list[str]) -> tuple[Prompt, list[Member]]:
        """The base's prompt, and that of each member at the timesteps where it acts."""
        ids = self.diffuser.tokenize(prompts)

        def made(encoders: Mapping[str, nn.Module]) -> Prompt:
            return Prompt(embed(encoders, ids), self.diffuser.null(encoders))

        members = [
            Member(made({**self.diffuser.encoders, **encoder.modules}), weight, timesteps(encoder.window))
            for encoder, weight in self.mixture
        ]
        return made(self.diffuser.encoders), members

    def _outputs(
        self,
        latents: Tensor,
        timestep: int,
        conditions: list[tuple[Tensor, Tensor]],
        masks: dict[str, list[Tensor]] | None,
    ) -> tuple[Tensor, ...]:
        """The network's output under each pair of text and object, in one call."""
        texts, objects = (torch.cat(column) for column in zip(*conditions, strict=True))
        found = self.unet(
            latents.repeat(len(conditions), 1, 1, 1),
            timestep,
            texts,
            added_cond_kwargs={"image_embeds": [objects]},
            cross_attention_kwargs=masks,
        ).sample
        return found.chunk(len(conditions))


def load(source: str | Path, device: torch.device | str = "cpu", runs: Path = RUNS) -> Customizer:
    """An object encoder on the base model that it was trained for.

    `source` is a run's folder (its last checkpoint), a bundle's, or a registered version: `models:/NAME@ALIAS`, in the
    registry of `MLFLOW_TRACKING_URI` or else of the folder `runs`.

    Raises RecipeError where there is no object encoder, BundleError for a bundle that is not whole, EncoderRefused
    where the base has changed, UnknownEncoder for a name that is not registered.
    """
    folder = Path(source)
    if (folder / "recipe.toml").is_file():
        recipe, last = load_run(folder), checkpoint.latest(folder)
        if not isinstance(recipe.task, ObjectEncoder) or last is None:
            raise RecipeError(f"{source}: no checkpoint of an object encoder in it (task.kind = {recipe.task.kind!r})")
        return assemble(load_diffuser(recipe.model, device), last)
    if not (folder / "encoder.toml").is_file():
        if not str(source).startswith("models:/"):
            load_run(folder)  # says what is missing
        folder = fetch(resolve(tracking.client(runs), str(source)))
    return _from_bundle(folder, str(source), device)


def _from_bundle(folder: Path, name: str, device: torch.device | str) -> Customizer:
    registry.verify_bundle(folder)
    description = registry.description_of(folder)
    if description.get("kind") != OBJECT_ENCODER:
        raise RecipeError(f"{name}: a text encoder; expected an object encoder")
    wanted = description["base"]
    try:
        diffuser = load_diffuser(Model(path=wanted["model"]), device)
    except (ValueError, OSError) as error:
        raise RecipeError(f"the base of {name} is not here: {error}") from None
    for part in ("text_encoder", "unet"):
        if weights_digest([getattr(diffuser, part)]) != wanted[f"{part}_sha256"]:
            raise EncoderRefused(f"{name}: made for a {part} that {wanted['model']} does not have any more")
    return assemble(diffuser, folder)


def assemble(diffuser: Diffuser, folder: Path) -> Customizer:
    """A base model with a folder's IP-Adapter file and image encoder, and its tuned UNet if there is one."""
    state = object_adapter.read(folder / object_adapter.FILE)
    tokens = object_adapter.tokens_of(state)
    encoder = object_condition.load(folder / object_condition.FOLDER, tokens, diffuser.device)
    tuned = any((folder / name).is_dir() for name in ("unet", trainable.LORA_FOLDER))
    unet: Any = trainable.load(diffuser, folder)["unet"] if tuned else copy.deepcopy(diffuser.unet)
    set_attention(unet, "auto", diffuser.device, reduced=diffuser.precision != torch.float32)
    object_adapter.install(unet, state, eager=eager_is_faster(diffuser.device, diffuser.precision != torch.float32))
    return Customizer(diffuser, freeze(unet), encoder)


def mixed(customizer: Customizer, mixture: Mapping[str, float], runs: Path = RUNS) -> Customizer:
    """The same with tuned text encoders, bundles' folders or `models:/NAME@ALIAS`, of these weights.

    Raises MixtureError for weights that make no mixture, BundleError, EncoderRefused or UnknownEncoder as `load`.
    """
    members = []
    for name, weight in mixture.items():
        found = Path(name) if Path(name).is_dir() else resolve(tracking.client(runs), name)
        members.append((load_encoder(found, customizer.diffuser), weight))
    check_weights([(weight, timesteps(encoder.window)) for encoder, weight in members])
    return replace(customizer, mixture=tuple(members))
