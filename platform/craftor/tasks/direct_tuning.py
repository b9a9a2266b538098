"""Image-caption pairs -> reward of the one-step prediction -> gradient for the text encoder (TextCraftor, 3.2.1).

The paper's first technique and its baseline: an image's latents are noised to a random level, the UNet predicts the
clean latents in one call, and the rewards score what they decode to (equations 4 and 5). At high noise that prediction
is a blur, which is why rolling out from prompts alone replaced it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from craftor import seeds, trainable
from craftor.decode import decode
from craftor.denoise import Prompt
from craftor.diffuser import assert_frozen, load
from craftor.embed import Condition, embed
from craftor.image_statistics import measure, summarise
from craftor.recipe import DirectTuning, Recipe
from craftor.scoring import Elsewhere, Scoring
from craftor.stream import Rows


class DirectTuningTask:
    """One graph per batch: encoder, one guided UNet call, decoder, rewards."""

    def __init__(
        self, recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None
    ) -> None:
        assert isinstance(recipe.task, DirectTuning)
        self.settings, self.seed = recipe.task, recipe.seed
        self.diffuser = load(recipe.model, device)
        parts = self.settings.train.parts
        self.module = trainable.make(self.diffuser, parts, recipe.seed)
        self.rates: Mapping[str, float | None] = {name: part.lr for name, part in parts.items()}
        trained = dict(self.module.items())
        self.encoders = {name: trained.get(name, original) for name, original in self.diffuser.encoders.items()}
        # Every training timestep is a denoising step of the finest schedule; a sample takes one of them.
        num_timesteps = self.diffuser.scheduler.config.num_train_timesteps
        if self.settings.timesteps[1] >= num_timesteps:
            raise ValueError(
                f"task.timesteps = {list(self.settings.timesteps)}: this model has timesteps 0 to {num_timesteps - 1}"
            )
        finest = self.settings.rollout.model_copy(update={"num_steps": num_timesteps})
        self.guided = self.diffuser.guided(finest, trained.get("unet"))
        self.scoring = Scoring(self.settings, recipe.guards, self.diffuser.device, elsewhere or {})
        self.batch_size = recipe.run.batch_size
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

    def assert_frozen(self) -> None:
        for name, part in {**self.diffuser.encoders, "unet": self.diffuser.unet, "vae": self.diffuser.vae}.items():
            assert_frozen(part, name)
        self.scoring.assert_frozen()

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        device, shape = self.diffuser.device, self.diffuser.latent_shape
        latents = torch.from_numpy(rows.columns["latents"]).float().view(-1, *shape).to(device)
        noise = seeds.normal(self.seed, rows.position, "noise", shape).to(device)
        low, high = self.settings.timesteps
        timesteps = low + (seeds.uniform(self.seed, rows.position, "timestep") * (high - low + 1)).long()
        p, q, alpha, sigma = self._coefficients(timesteps)
        noisy = alpha * latents + sigma * noise
        prompt = Prompt(embed(self.encoders, rows.ids(device)), self.diffuser.null(self.encoders))
        predicted = p * noisy + q * self.guided.output(noisy, prompt, timesteps.to(device))  # equation 4
        images = decode(self.diffuser.vae, predicted, self.diffuser.decoder_precision)
        prompts = [str(prompt) for prompt in rows.columns["prompt"]]
        scores, gradient = self.scoring(images, prompts, share, rows.position[0] // self.batch_size)
        torch.autograd.backward([images, share * self._anchor(rows, prompt.condition)], [gradient, None])

        self.images = images.detach()
        total = self.scoring.total(scores)
        return {"loss": -total, "total": total, **scores, **measure(self.images, prompts)}

    def _anchor(self, rows: Rows, condition: Condition) -> Tensor:
        """The penalty on the embeddings' distance from the original encoder's."""
        if not self.settings.anchor:
            return condition.embeds.new_zeros((), requires_grad=True)
        with torch.no_grad():
            original = embed(self.diffuser.encoders, rows.ids(self.diffuser.device))
        return self.settings.anchor * (condition.embeds - original.embeds).square().mean()

    def _coefficients(self, timesteps: Tensor) -> Tensor:
        """x0's (p, q) and the noise level's (alpha, sigma), as columns over the rows."""
        steps = [self.guided.schedule[self.guided.num_steps - 1 - timestep] for timestep in timesteps.tolist()]
        table = torch.tensor([(step.p, step.q, step.alpha, step.sigma) for step in steps], dtype=torch.float32)
        return table.T[..., None, None, None].to(self.diffuser.device)
