"""TextCraftor's own training step, as the yardstick for speed and gradients (arXiv 2403.18978, section 3.2.2).

Written from recorded facts about the paper and its released program, never from the program itself. In brackets the
sections of those notes (`shared/notes/textcraftor.md`) that each choice restates.

- 25 DDIM steps in every run, none cached, on the grid 999, 959, ..., 39, which is diffusers' `trailing`
  spacing [A.2; D4.5].
- Steps before the last K see the original encoder, without gradient; the last K see the trained one, each a whole-UNet
  non-reentrant checkpoint; nothing is detached between them [A.2; D4.4].
- Guidance by one UNet call on 2B rows, unconditional first; the null prompt goes through the trained encoder with
  gradient in the window [A.2].
- The null prompt and the prompts are encoded in calls of their own, the null one as B copies, by both
  encoders [A.2; D4.6].
- Only the VAE is frozen: the UNet's weights and those of the CLIP and PickScore rewards receive gradient, which nobody
  uses or clears [D4.1, D4.2]. The aesthetic reward, which those facts do not name, stays frozen.
- Each reward preprocesses the images itself and encodes its texts again every step, without gradient [A.3; D4.6].
- All rewards stand in one graph: one backward pass of the weighted sum [A.3].
- The decoder and the rewards are not checkpointed [A.4]; diffusers' default attention [D3.11].
- fp32 throughout; AdamW at PyTorch's defaults, no clipping, no average, no schedule [A.4].

`mathematics="paper"` has its scores too: adaptive average pooling to the reward's size, PickScore as the mean over all
B x B pairs, and a clamp without gradient at saturated pixels [A.2, A.3, D2.1, D2.13]. `"ours"` takes Craftor's
preprocessing and matched pairs instead, so that the two gradients are of the same function and can be compared.

Left out, because they cannot slow a CPU run or would not concern it: autocast to float32, the gradient scaler, TF32 and
DistributedDataParallel [A.4]; tokenising, which Craftor does ahead of the step as well.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.models import RewardSource, Workload
from craftor_rewards import Aesthetic, PickScore
from craftor_rewards.clip import ClipReward

Mathematics = Literal["paper", "ours"]


class PaperProcedure:
    """`step()` is one optimiser step; `backward(noise)` leaves the gradient in `module`."""

    def __init__(self, work: Workload, *, mathematics: Mathematics = "ours") -> None:
        self.work = work
        pipeline = StableDiffusionPipeline.from_pretrained(
            work.pipeline, dtype=torch.float32, safety_checker=None, feature_extractor=None
        )
        self.unet, self.vae = pipeline.unet.requires_grad_(True), pipeline.vae.requires_grad_(False)
        self.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
        )
        self.scheduler.set_timesteps(work.num_steps)
        self.module = pipeline.text_encoder.requires_grad_(True)
        self.original = copy.deepcopy(self.module)
        self.rewards = [PaperReward(source, work.prompts, mathematics) for source in work.rewards.values()]
        self.straight_through = mathematics == "ours"
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=work.lr)

        def tokenize(prompts: list[str]) -> Tensor:
            length = pipeline.tokenizer.model_max_length
            return pipeline.tokenizer(
                prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids

        self.prompt_ids, self.null_ids = tokenize(work.prompts), tokenize([""] * len(work.prompts))
        side = self.unet.config.sample_size
        self.latent_shape = (len(work.prompts), self.unet.config.in_channels, side, side)

    def step(self) -> None:
        self.backward(torch.randn(self.latent_shape))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, noise: Float[Tensor, "b c h w"]) -> None:
        """Fill the trained encoder's `.grad`, and that of everything else that is not frozen."""
        with torch.no_grad():
            original = torch.cat([self.original(self.null_ids)[0], self.original(self.prompt_ids)[0]])
        tuned = torch.cat([self.module(self.null_ids)[0], self.module(self.prompt_ids)[0]])
        latents = noise
        for index, timestep in enumerate(self.scheduler.timesteps):
            if index < self.work.num_steps - self.work.window:
                with torch.no_grad():
                    predicted = self.unet(torch.cat([latents] * 2), timestep, original).sample
            else:
                predicted = checkpoint(self.unet, torch.cat([latents] * 2), timestep, tuned, use_reentrant=False).sample
            unconditional, conditional = predicted.chunk(2)
            guided = unconditional + self.work.guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(guided, timestep, latents).prev_sample
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5
        clamped = images.clamp(0, 1)
        images = images + (clamped - images).detach() if self.straight_through else clamped
        losses = [-reward.weight * reward(images).mean() for reward in self.rewards]
        torch.stack(losses).sum().backward()
        for loss in losses:
            loss.item()  # the meters wait for each value [D4.9]


class PaperReward:
    """One reward of the sum, its model loaded for itself and its texts encoded at every call."""

    def __init__(self, source: RewardSource, prompts: list[str], mathematics: Mathematics) -> None:
        self.weight, self.mathematics, self.prompts = source.weight, mathematics, prompts
        self.reward = source.load()
        if not isinstance(self.reward, ClipReward):
            return
        self.reward.towers.requires_grad_(True)
        self.ids = self.reward.towers.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.reward.towers.num_tokens,
            return_tensors="pt",
        ).input_ids

    def __call__(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"] | Float[Tensor, "b b"]:
        """Scores per sample, or per pair for PickScore under the paper's mathematics."""
        paper = self.mathematics == "paper"
        if not isinstance(self.reward, ClipReward | Aesthetic):
            return self.reward(images, self.prompts)
        features = self.reward.towers.image_features(images, resize="average_pool" if paper else "bicubic")
        if isinstance(self.reward, Aesthetic):
            return self.reward.head(features)
        clip = self.reward.towers.clip
        with torch.no_grad():
            texts = F.normalize(clip.text_projection(clip.text_model(input_ids=self.ids).pooler_output), dim=-1)
        if not isinstance(self.reward, PickScore):
            return (features * texts).sum(-1)
        return clip.logit_scale.exp() * (texts @ features.T if paper else (features * texts).sum(-1))
