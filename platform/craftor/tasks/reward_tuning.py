"""Prompts -> rewards -> gradient for text encoder or UNet (TextCraftor, section 3.2.2 and algorithm 1)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from craftor import prefix, seeds, trainable
from craftor.decode import decode
from craftor.denoise import Chain, Prompt, State, sample
from craftor.diffuser import assert_frozen, load
from craftor.embed import Condition, embed
from craftor.image_statistics import measure, summarise
from craftor.object_settings import IDENTITY
from craftor.plan import Plan, plan
from craftor.prefix_cache import read_manifest
from craftor.recipe import Recipe, RewardTuning
from craftor.replay import kept_steps, measure_kept_steps
from craftor.scoring import Elsewhere, Scoring
from craftor.solver import add_noise, begun_at
from craftor.stream import Rows

if TYPE_CHECKING:
    from craftor.shown_objects import ShownObjects


class RewardTuningTask:
    """The original encoder conditions the steps outside the window, the trained one those inside."""

    def __init__(
        self, recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None
    ) -> None:
        assert isinstance(recipe.task, RewardTuning)
        self.settings, self.seed = recipe.task, recipe.seed
        self.diffuser = load(recipe.model, device)
        before = trainable.load(self.diffuser, Path(recipe.model.text_encoder)) if recipe.model.text_encoder else {}
        self.module = trainable.make(self.diffuser, self.settings.train.parts, recipe.seed, before)
        self.rates: Mapping[str, float | None] = {name: part.lr for name, part in self.settings.train.parts.items()}
        self.before = {name: part for name, part in before.items() if name not in self.module}
        # Steps inside the window see what trains, beside what was tuned before, beside the base's own.
        known = {**self.diffuser.encoders, **before, **dict(self.module.items())}
        self.tuned = {name: known[name] for name in self.diffuser.encoders}
        self.shown = self._shown(recipe.seed)
        unet = self.shown.unet if self.shown else known.get("unet")
        self.guided = self.diffuser.guided(self.settings.rollout, unet)
        own = {IDENTITY: self.shown.likeness} if self.shown and self.shown.likeness else {}
        self.scoring = Scoring(self.settings, recipe.guards, self.diffuser.device, elsewhere or {}, own)
        self.batch_size = recipe.run.batch_size
        self.null_ids = self.diffuser.tokenize([""])
        self.span = self.settings.window.span(self.guided.num_steps)
        self.direct = self.settings.window.gradient_path == "direct"
        self.outside_is_tuned = self.settings.window.outside == "tuned"
        self.kept = kept_steps(self.settings.window, self.guided.num_steps)
        cache = self.settings.prefix.cache
        self.prefix_stop = read_manifest(cache)["stop"] if cache else self.span.start
        self.images: Tensor | None = None

    @property
    def needs_start(self) -> bool:
        return self.scoring.composition.needs_start

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        return {**summarise(metrics), **self.scoring.composition.observe(metrics)}

    def state(self) -> dict[str, float]:
        return self.scoring.composition.state()

    def restore(self, state: Mapping[str, float]) -> None:
        self.scoring.composition.restore(state)

    def pictures(self) -> Tensor | None:
        return self.images

    def save(self, folder: Path, module: nn.ModuleDict | None = None) -> None:
        trainable.save(module or self.module, self.settings.train.parts, folder)
        for name, part in self.before.items():  # what trains was made for them: whoever loads the folder has both
            tuned_before: Any = part
            tuned_before.save_pretrained(folder / name, safe_serialization=True)

    def assert_frozen(self) -> None:
        for name, part in {**self.diffuser.encoders, "unet": self.diffuser.unet, "vae": self.diffuser.vae}.items():
            assert_frozen(part, name)
        self.scoring.assert_frozen()

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        prompts = [str(prompt) for prompt in rows.columns["prompt"]]
        original, tuned = self._embed(rows)
        outside = Prompt(tuned.condition.detach(), tuned.null.detach()) if self.outside_is_tuned else original
        where = plan(self.settings.window, self.guided.num_steps, self.seed, rows.position)
        state = self._prefix(rows, outside, where.start)
        anchor = self.settings.anchor * (tuned.condition.embeds - original.condition.embeds).square().mean()
        guided = self.guided
        if self.settings.window.copies > 1:
            state, where, prompts, tuned, outside = self._copies(rows, state, where, prompts, tuned, outside)
            # A copy has no step before its last, so multistep solvers take it as their first.
            guided = replace(guided, schedule=begun_at(guided.schedule, guided.num_steps - 1))

        tuned_leaves = Prompt(tuned.condition.leaf(), self._null(tuned, original))
        kept = self._kept_steps(state, tuned_leaves, prompts, where)
        chain = Chain(guided, where, tuned_leaves, outside, self.direct, kept)
        final = chain.forward(state)
        images = decode(self.diffuser.vae, final, self.diffuser.decoder_precision)
        scores, image_gradient = self.scoring(images, prompts, share, rows.position[0] // self.batch_size)
        (final_gradient,) = torch.autograd.grad(images, final, image_gradient)
        chain.backward(final_gradient)
        self._into_encoders(tuned, tuned_leaves, share * anchor)

        self.images = images.detach()
        total = self.scoring.total(scores)
        metrics = {"loss": -total, "total": total, **scores, **measure(self.images, prompts)}
        return {name: v.unflatten(0, (-1, len(rows.position))).mean(dim=0) for name, v in metrics.items()}

    def _embed(self, rows: Rows) -> tuple[Prompt, Prompt]:
        """The original encoders' prompt, and the trained ones' with its graph."""
        with torch.no_grad():
            original = self._encode(self.diffuser.encoders, rows)
        if all(self.tuned[name] is encoder for name, encoder in self.diffuser.encoders.items()):
            tuned = original  # the UNet alone trains
        else:
            tuned = self._encode(self.tuned, rows)
        if self.shown is None:
            return original, tuned
        original, tuned = self.shown.beside((original, tuned), rows.position)
        return original, tuned

    def _shown(self, seed: int) -> "ShownObjects | None":
        if self.settings.shown is None:
            return None
        from craftor.shown_objects import ShownObjects  # with it comes MLflow, which other workers need not load

        return ShownObjects(self.settings.shown, seed, self.diffuser)

    def _encode(self, encoders: Mapping[str, nn.Module], rows: Rows) -> Prompt:
        """The empty prompt is one more row, or zeros."""
        ids = rows.ids(self.diffuser.device)
        if self.diffuser.zero_null:
            condition = embed(encoders, ids)
            return Prompt(condition, condition[:1].map(torch.zeros_like))
        condition = embed(encoders, {name: torch.cat([self.null_ids[name], ids[name]]) for name in ids})
        return Prompt(condition[1:], condition[:1])

    def _null(self, tuned: Prompt, original: Prompt) -> Condition:
        policies = {"tuned": tuned.null.leaf, "tuned_no_grad": tuned.null.detach, "original": original.null.detach}
        return policies[self.settings.window.null]()

    def _prefix(self, rows: Rows, outside: Prompt, start: int) -> State:
        """The state at the batch's first step with gradient; its early part is read where it was computed apart."""
        shape, stop = self.diffuser.latent_shape, self.prefix_stop
        if prefix.LATENTS in rows.columns:
            state = prefix.read(rows, shape, self.diffuser.device)
        else:
            state = prefix.compute(self.guided, rows, outside, self.seed, shape, stop)
        return sample(self.guided, state, outside, range(stop, start))

    def _copies(
        self, rows: Rows, state: State, where: Plan, prompts: list[str], tuned: Prompt, outside: Prompt
    ) -> tuple[State, Plan, list[str], Prompt, Prompt]:
        """DRaFT-LV: finish each sample without gradient, then noise it `copies` times to the last step."""
        last, copies = self.guided.num_steps - 1, self.settings.window.copies
        finished = sample(self.guided, state, outside, range(where.start, last + 1)).latents
        shape = self.diffuser.latent_shape
        noise = [seeds.normal(self.seed, rows.position, f"copy {copy}", shape) for copy in range(copies)]
        again = torch.arange(len(prompts)).repeat(copies)
        noisy = add_noise(self.guided.schedule[last], finished[again], torch.cat(noise).to(finished.device))
        spread = [Prompt(prompt.condition[again], prompt.null) for prompt in (tuned, outside)]
        return State(noisy), where[again], prompts * copies, spread[0], spread[1]

    def _kept_steps(self, state: State, tuned: Prompt, prompts: list[str], where: Plan) -> int:
        """Steps that keep their graph; measured at the first batch where the recipe leaves it open."""
        if self.kept is None:
            limit = self.settings.window.memory_limit_gib
            assert limit is not None
            self.kept = measure_kept_steps(
                limit, self.guided, self.diffuser, self.scoring, state.latents, tuned, prompts, where.start
            )
        return self.kept

    def _into_encoders(self, tuned: Prompt, leaves: Prompt, anchor: Tensor) -> None:
        """What has collected at the embeddings, through the trained encoders: once, whatever the window."""
        tensors, gradients = [anchor], [torch.ones_like(anchor)]
        for condition, collected in zip(tuned, leaves, strict=True):
            for tensor, leaf in zip(condition.tensors, collected.tensors, strict=True):
                if leaf.grad is not None:
                    tensors.append(tensor)
                    gradients.append(leaf.grad)
        if any(tensor.requires_grad for tensor in tensors):
            reaching = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
            torch.autograd.backward([tensors[i] for i in reaching], [gradients[i] for i in reaching])
