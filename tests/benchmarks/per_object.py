"""Textual Inversion and DreamBooth on a few pictures of one object: the training that an object encoder saves.

What trains, on what, is as in diffusers' examples. Textual Inversion learns the embedding of one new word, begun as the
word for the object's kind; all else is frozen. DreamBooth tunes the whole UNet on a meaningless word before the kind,
beside pictures of the kind that the base drew itself (prior preservation, weight 1). Steps and learning rates are for
the micro model. Pictures have the captions of their scenes, with the new word in them, where the examples have one
sentence for all: so scene and object can be told apart, which is to these methods' advantage.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel

from craftor import seeds
from craftor.decode import decode, encode
from craftor.denoise import Prompt, State, sample
from craftor.diffuser import Diffuser
from craftor.embed import Condition, embed
from craftor.precision import fast_on_cpu
from craftor.rollout import Rollout
from craftor.tasks.noising import at
from craftor_micro.world import SHAPES

WORD = "<object>"
NUM_STEPS, GUIDANCE_SCALE = 20, 4.0
HALF = 2
"""Bytes of a weight as it would be stored."""


@dataclass(frozen=True)
class Pictures:
    """One object, in a scene or more."""

    images: Float[Tensor, "n 3 H W"]
    captions: list[str]
    """Without the object's colours; each has one word of `SHAPES`."""


@dataclass(frozen=True)
class Fitted:
    """A pipeline that knows one object by a word."""

    diffuser: Diffuser
    keeps_kind: bool
    """Whether the word stands before the object's kind (DreamBooth), or in its place (Textual Inversion)."""
    seconds: float
    """Of the processor."""
    num_bytes: int
    """What is stored for the object, in half precision."""

    def draw(self, captions: list[str], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """The object in scenes that captions ask for."""
        return drawn(self.diffuser, [with_word(caption, self.keeps_kind) for caption in captions], noise)


def textual_inversion(
    diffuser: Diffuser, pictures: Pictures, *, num_steps: int = 300, lr: float = 2e-2, seed: int = 0
) -> Fitted:
    """Learn a word for the object."""
    started = time.process_time()
    knows = _with_new_word(diffuser, _kind(pictures.captions[0]))
    encoder = knows.text_encoder
    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    table.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:-1]), gradient[-1:]]))
    optimizer = torch.optim.AdamW([table], lr=lr, weight_decay=0.0)
    ids = knows.tokenize([with_word(caption, keeps_kind=False) for caption in pictures.captions])
    latents = encode(diffuser.vae, pictures.images)
    for noise, timesteps in _draws(diffuser, len(latents), num_steps, seed):
        loss = _error(diffuser, diffuser.unet, latents, noise, timesteps, embed(knows.encoders, ids)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.requires_grad_(False)
    return Fitted(knows, False, time.process_time() - started, HALF * table.shape[1])


def dreambooth(
    diffuser: Diffuser,
    pictures: Pictures,
    *,
    num_steps: int = 150,
    lr: float = 2e-4,
    num_prior: int = 16,
    seed: int = 0,
) -> Fitted:
    """Tune the UNet to draw the object for a word."""
    started = time.process_time()
    knows = replace(_with_new_word(diffuser, None), unet=copy.deepcopy(diffuser.unet).requires_grad_(True))
    with torch.no_grad():
        said = [pictures.captions[i % len(pictures.captions)] for i in range(num_prior)]
        noise = seeds.normal(seed, range(num_prior), "prior", diffuser.latent_shape)
        prior = encode(diffuser.vae, drawn(diffuser, said, noise).clamp(0, 1))
        own = [with_word(caption, keeps_kind=True) for caption in pictures.captions]
        text = Condition(torch.cat([_text(knows, own), _text(diffuser, said)]))
    latents, num = torch.cat([encode(diffuser.vae, pictures.images), prior]), len(own)
    optimizer = torch.optim.AdamW(knows.unet.parameters(), lr=lr, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for noise, timesteps in _draws(diffuser, 2 * num, num_steps, seed):
        rows = torch.cat([torch.arange(num), num + torch.randint(num_prior, (num,), generator=generator)])
        error = _error(diffuser, knows.unet, latents[rows], noise, timesteps, text[rows])
        optimizer.zero_grad()
        (error[:num].mean() + error[num:].mean()).backward()
        optimizer.step()
    knows.unet.requires_grad_(False)
    stored = sum(parameter.numel() for parameter in knows.unet.parameters())
    return Fitted(knows, True, time.process_time() - started, HALF * stored)


def with_word(caption: str, keeps_kind: bool) -> str:
    """A caption of the new word: in the place of the object's kind, or before it."""
    kind = _kind(caption)
    return " ".join(
        f"{WORD} {kind}" if word == kind and keeps_kind else WORD if word == kind else word for word in caption.split()
    )


@torch.no_grad()
def drawn(diffuser: Diffuser, prompts: list[str], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Pictures of a pipeline by ordinary guidance."""
    guided = diffuser.guided(Rollout(num_steps=NUM_STEPS, guidance_scale=GUIDANCE_SCALE))
    final = sample(guided, State(noise), Prompt(Condition(_text(diffuser, prompts)), diffuser.null()), range(NUM_STEPS))
    return decode(diffuser.vae, final.latents)


def _kind(caption: str) -> str:
    return next(word for word in caption.split() if word in SHAPES)


def _text(diffuser: Diffuser, prompts: list[str]) -> Tensor:
    return embed(diffuser.encoders, diffuser.tokenize(prompts)).embeds


def _with_new_word(diffuser: Diffuser, like: str | None) -> Diffuser:
    """The same pipeline with a tokenizer and a text encoder that have `WORD`, begun as another word or at random."""
    tokenizer, encoder = copy.deepcopy(diffuser.tokenizer), copy.deepcopy(diffuser.text_encoder)
    tokenizer.add_tokens(WORD)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        if like is None:
            others = table[:-1]
            table[-1] = others.mean(0) + others.std(0) * torch.randn(
                table.shape[1], generator=torch.Generator().manual_seed(0)
            )
        else:
            (number,) = tokenizer(like, add_special_tokens=False).input_ids
            table[-1] = table[number]
    assert isinstance(encoder, CLIPTextModel)
    encoder.requires_grad_(False)
    return replace(diffuser, tokenizers={"text_encoder": tokenizer}, encoders={"text_encoder": encoder})


def _draws(diffuser: Diffuser, num: int, num_steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise and timesteps of each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        noise = torch.randn(num, *diffuser.latent_shape, generator=generator)
        yield noise, torch.randint(diffuser.scheduler.config.num_train_timesteps, (num,), generator=generator)


def _error(
    diffuser: Diffuser, unet: nn.Module, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Condition
) -> Float[Tensor, " b"]:
    noisy, target, _ = at(diffuser, latents, noise, timesteps)
    with fast_on_cpu():
        predicted = unet(noisy, timesteps, text.embeds).sample
    return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
