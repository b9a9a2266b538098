"""Prompts -> scores -> policy gradient for text encoder or UNet: for rewards that have no gradient of their own.

Denoising is a chain of decisions (DDPO, Black et al. 2023): inside the window each step is drawn from a Gaussian
(`stochastic`), and what raises the density of the samples that scored above their prompt's others is learnt. The
rewards are only asked for numbers. A row of the batch is a prompt; its samples are made together, so that what a row
teaches depends on that row alone, whatever the workers and micro-batches.
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from craftor import objective, seeds
from craftor.advantages import PromptBaselines, group_relative
from craftor.decode import decode
from craftor.denoise import Guided, Prompt, State, sample
from craftor.image_statistics import PROMPT, measure
from craftor.recipe import PolicyGradient, Recipe
from craftor.rollout import draw
from craftor.scoring import Elsewhere
from craftor.stochastic import divergence, log_ratio, noisy
from craftor.stream import Rows
from craftor.tasks.reward_tuning import RewardTuningTask


class Action(NamedTuple):
    """One stochastic step of a rollout: where it was taken, its mean under the policy that took it, and its noise."""

    step_index: int
    latents: Tensor
    mean: Tensor
    noise: Tensor


class PolicyGradientTask(RewardTuningTask):
    """The same rollout, encoders, rewards and checkpoints as tuning by the reward's gradient; another estimator."""

    def __init__(
        self, recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None
    ) -> None:
        assert isinstance(recipe.task, PolicyGradient)
        super().__init__(recipe, device, elsewhere)
        self.policy = recipe.task
        drawn = draw(self.policy.window, self.guided.num_steps, 0.0, 0.0)
        self.noisy = {index: noisy(self.guided.schedule[index], self.policy.eta) for index in drawn.steps}
        self.base = self.diffuser.guided(self.policy.rollout)
        # What samples: the policy itself, or its copy from the beginning of every `updates_per_rollout` steps.
        self.actor, self.phase = self.module, -1
        if self.policy.updates_per_rollout > 1:
            self.actor = copy.deepcopy(self.module).requires_grad_(False)
        acting = dict(self.actor.items())
        self.acting_encoders = {name: acting.get(name, encoder) for name, encoder in self.tuned.items()}
        unet = acting.get("unet")
        self.acting = self.guided if unet is None else self.diffuser.guided(self.policy.rollout, unet)
        self.baselines = PromptBaselines(self.policy.min_count, self.policy.memory)

    @property
    def needs_start(self) -> bool:
        return super().needs_start or (self.policy.advantage == "prompt" and self.baselines.needs_start)

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        if self.policy.advantage == "prompt":
            self.baselines.observe(metrics["total"], metrics[PROMPT][:, 0])
        return super().observe({name: values.flatten(0, 1) for name, values in metrics.items()})

    def state(self) -> dict[str, float]:
        return {**super().state(), **{f"baseline/{name}": value for name, value in self.baselines.state().items()}}

    def restore(self, state: Mapping[str, float]) -> None:
        own = {name: value for name, value in state.items() if name.startswith("baseline/")}
        self.baselines.restore({name.removeprefix("baseline/"): value for name, value in own.items()})
        super().restore({name: value for name, value in state.items() if name not in own})

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        number = rows.position[0] // self.batch_size
        self._refresh(number)
        many = self.policy.samples_per_prompt
        prompts = [str(prompt) for prompt in rows.columns["prompt"]] * many
        original, tuned = self._embed(rows)
        anchor = self.settings.anchor * (tuned.condition.embeds - original.condition.embeds).square().mean()
        actions, final = self._roll_out(rows, original, self._acting_prompt(rows, tuned))
        original, tuned = self._each(original), self._each(tuned)
        with torch.no_grad():
            self.images = decode(self.diffuser.vae, final, self.diffuser.decoder_precision)
        waiting = self.scoring.begin(self.images, prompts, number)
        base_means = self._base_means(actions, original)  # while rewards elsewhere compute
        scores = waiting()
        total, looks = self.scoring.total(scores), measure(self.images, prompts)
        advantage = self._advantages(total, looks[PROMPT])

        leaves = Prompt(tuned.condition.leaf(), self._null(tuned, original))
        figures = self._backward(actions, base_means, leaves, advantage, share)
        self._into_encoders(tuned, leaves, share * anchor)
        metrics = {"loss": figures.pop("loss"), "total": total, **scores, **figures, **looks}
        return {name: self._by_prompt(values) for name, values in metrics.items()}

    def _refresh(self, number: int) -> None:
        """Sample from the present policy from here on, where optimiser step `number` begins a rollout."""
        phase = number // self.policy.updates_per_rollout
        if self.actor is not self.module and phase != self.phase:
            self.actor.load_state_dict(self.module.state_dict())
        self.phase = phase

    @torch.no_grad()
    def _acting_prompt(self, rows: Rows, tuned: Prompt) -> Prompt:
        """What the sampling policy's encoders make of the prompts."""
        if self.actor is self.module:
            return Prompt(tuned.condition.detach(), tuned.null.detach())
        return self._encode(self.acting_encoders, rows)

    @torch.no_grad()
    def _roll_out(self, rows: Rows, original: Prompt, acting: Prompt) -> tuple[list[Action], Tensor]:
        """Samples of the acting policy, sample k of all prompts after sample k - 1 of all; and their final latents."""
        outside = acting if self.outside_is_tuned else original
        inside = Prompt(acting.condition, original.null if self.settings.window.null == "original" else acting.null)
        latents, actions = self._normal(rows, "noise"), []
        fork = min(self.noisy) if self.policy.same_noise else 0
        if self.policy.same_noise:
            latents = sample(self.acting, State(latents[: len(rows.position)]), outside, range(fork)).latents
            latents = latents.repeat(self.policy.samples_per_prompt, 1, 1, 1)
        inside, outside = self._each(inside), self._each(outside)
        for index, step in list(enumerate(self.acting.schedule))[fork:]:
            prompt = inside if index in self.noisy else outside
            output = self.acting.output(latents, prompt, step.timestep)
            if index not in self.noisy:
                latents = step.advance(latents, step.x0(latents, output), None)
                continue
            mean, noise = self.noisy[index].mean(latents, output), self._normal(rows, f"action {index}")
            actions.append(Action(index, latents, mean, noise))
            latents = mean + self.noisy[index].deviation * noise
        return actions, latents

    def _each(self, prompt: Prompt) -> Prompt:
        """Each prompt as often as it is sampled."""
        again = torch.arange(len(prompt.condition)).repeat(self.policy.samples_per_prompt)
        return Prompt(prompt.condition[again], prompt.null)

    def _normal(self, rows: Rows, purpose: str) -> Tensor:
        """Noise that each sample of each prompt has for itself."""
        many, shape = self.policy.samples_per_prompt, self.diffuser.latent_shape
        parts = [seeds.normal(self.seed, rows.position, f"{purpose} of sample {k}", shape) for k in range(many)]
        return torch.cat(parts).to(self.diffuser.device)

    @torch.no_grad()
    def _base_means(self, actions: list[Action], original: Prompt) -> list[Tensor | None]:
        """Where the untrained model would have gone on average, if the divergence from it is to be known."""
        if not self.policy.kl_weight:
            return [None] * len(actions)
        return [self._mean(self.base, action, original) for action in actions]

    def _mean(self, guided: Guided, action: Action, prompt: Prompt) -> Tensor:
        noisy_step = self.noisy[action.step_index]
        return noisy_step.mean(action.latents, guided.output(action.latents, prompt, noisy_step.step.timestep))

    def _advantages(self, total: Tensor, numbers: Tensor) -> Tensor:
        by_prompt = self._by_prompt(total)
        if self.policy.advantage == "group":
            found = group_relative(by_prompt)
        else:
            found = self.baselines(by_prompt, self._by_prompt(numbers)[:, 0])
        bound = self.policy.advantage_clip
        return found.clamp(-bound, bound).T.flatten()

    def _backward(
        self, actions: list[Action], base_means: list[Tensor | None], leaves: Prompt, advantage: Tensor, share: float
    ) -> dict[str, Tensor]:
        """Step by step, so that one step's graph is alive at a time: steps share nothing but prompt and weights."""
        names = ("loss", "clipped", "kl") if self.policy.kl_weight else ("loss", "clipped")
        figures = {name: torch.zeros_like(advantage) for name in names}
        for action, base_mean in zip(actions, base_means, strict=True):
            deviation = self.noisy[action.step_index].deviation
            mean = self._mean(self.guided, action, leaves)
            ratio = log_ratio(mean, action.mean, action.noise, deviation).exp()
            loss = objective.policy_loss(ratio, advantage, self.policy.clip_range)
            if base_mean is not None:
                distance = divergence(mean, base_mean, deviation)
                figures["kl"] += distance.detach()
                loss = loss + self.policy.kl_weight * distance
            (share * loss.mean()).backward()  # to the leaves and, where the UNet trains, its parameters
            figures["loss"] += loss.detach()
            figures["clipped"] += ((ratio.detach() - 1).abs() > self.policy.clip_range) / len(actions)
        return figures

    def _by_prompt(self, values: Tensor) -> Tensor:
        """One row a prompt, with its samples."""
        return values.unflatten(0, (self.policy.samples_per_prompt, -1)).transpose(0, 1)
