"""`craftor.apply` in stock pipelines: our sampler's arithmetic, its windows, and nothing left behind when undone."""

import copy
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

import craftor
from craftor.decode import decode
from craftor.denoise import Prompt, State
from craftor.diffuser import Diffuser, load
from craftor.embed import embed
from craftor.encoders import EncoderRefused
from craftor.mixture import Member, MixtureError, sample_mixture
from craftor.recipe import Model
from craftor.registry import BundleError
from craftor.rollout import Rollout

FAMILIES = {"pipeline": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a small red star", "a large blue ring"]
KINDS = {
    "img2img": ("pipeline", StableDiffusionImg2ImgPipeline),
    "inpaint": ("pipeline", StableDiffusionInpaintPipeline),
    "inpaint by a UNet made for it": ("pipeline", StableDiffusionInpaintPipeline),
    "controlnet": ("pipeline", StableDiffusionControlNetPipeline),
    "sdxl img2img": ("sdxl", StableDiffusionXLImg2ImgPipeline),
    "sdxl inpaint": ("sdxl", StableDiffusionXLInpaintPipeline),
    "sdxl controlnet": ("sdxl", StableDiffusionXLControlNetPipeline),
}


def tuned(original: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy with other weights, as training leaves one."""
    module, generator = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def stock(tiny: Path, family: str, kind: type[DiffusionPipeline] | None = None, **parts: object) -> DiffusionPipeline:
    kind = kind or FAMILIES[family]
    if "XL" not in kind.__name__:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    pipe = kind.from_pretrained(tiny / family, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    return pipe


def picture(pipe: DiffusionPipeline, **settings: object) -> torch.Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 5, "guidance_scale": 4.0, "latents": noise, "output_type": "pt"} | settings
    return pipe(PROMPTS, **arguments).images


def expected(
    base: Diffuser, members: list[tuple[torch.nn.Module, float, range]], part: str, scale: float
) -> torch.Tensor:
    """What craftor's own sampler makes of the mixture."""
    ids, noise = base.tokenize(PROMPTS), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sets = [base.encoders, *({**base.encoders, part: module} for module, _, _ in members)]
    with torch.no_grad():
        first, *others = (Prompt(embed(encoders, ids), base.null(encoders)) for encoders in sets)
        mixed = [Member(p, weight, steps) for p, (_, weight, steps) in zip(others, members, strict=True)]
        guided = base.guided(Rollout(num_steps=5, guidance_scale=scale))
        return decode(base.vae, sample_mixture(guided, State(noise), first, mixed, range(5)).latents)


@pytest.mark.parametrize(("family", "part"), [*((f, "text_encoder") for f in FAMILIES), ("sdxl", "text_encoder_2")])
def test_a_mixture_from_text_is_the_one_craftor_samples(tiny: Path, family: str, part: str) -> None:
    """Two encoders in different timesteps (5 steps: 999, 799, 599, 399, 199), one of them at the very first step."""
    pipe, base = stock(tiny, family), load(Model(path=str(tiny / family)))
    one, other = (tuned(base.encoders[part], seed) for seed in (1, 2))
    plain = picture(pipe)
    mix = {one: {"weight": 0.7, "from": 999, "to": 700}, other: {"weight": 0.6, "from": 800, "to": 0}}
    with pytest.raises(MixtureError, match="that act together at 700 sum to 1.3, allowed: up to 1"):
        craftor.apply(pipe, mix)
    mix[other] = {"weight": 0.6, "from": 699, "to": 300}
    with craftor.apply(pipe, mix):
        mixed = picture(pipe)
    wanted = expected(base, [(one, 0.7, range(2)), (other, 0.6, range(2, 4))], part, 4.0)
    torch.testing.assert_close(mixed, wanted, rtol=1e-3, atol=3e-4)
    assert (mixed - plain).abs().max() > 5e-3
    assert torch.equal(picture(pipe), plain)


def test_without_guidance_there_is_no_negative_half(tiny: Path) -> None:
    pipe, base = stock(tiny, "pipeline"), load(Model(path=str(tiny / "pipeline")))
    one = tuned(base.text_encoder, 1)
    with craftor.apply(pipe, {one: {"weight": 0.5, "from": 600, "to": 200}}):
        mixed = picture(pipe, guidance_scale=1.0)
    wanted = expected(base, [(one, 0.5, range(2, 4))], "text_encoder", 1.0)
    torch.testing.assert_close(mixed, wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_zero_is_the_plain_pipeline_bit_for_bit(tiny: Path, family: str) -> None:
    pipe = stock(tiny, family)
    plain = picture(pipe)
    with craftor.apply(pipe, {tuned(pipe.text_encoder, 1): 0.0}):
        assert torch.equal(picture(pipe), plain)


def build(tiny: Path, kind: str) -> tuple[DiffusionPipeline, dict[str, object]]:
    """A pipeline of a kind, and what it needs beside the prompt."""
    family, pipeline = KINDS[kind]
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if "controlnet" in kind:
        plain = stock(tiny, family)
        torch.manual_seed(3)
        controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(8, 8, 8))
        for parameter in controlnet.parameters():  # what starts at zero would hide the control
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        return stock(tiny, family, pipeline, controlnet=controlnet), {"image": image}
    own = {}
    if "made for it" in kind:  # which reads the mask and what it leaves of the picture beside the latents
        torch.manual_seed(4)
        own["unet"] = UNet2DConditionModel.from_config(stock(tiny, family).unet.config, in_channels=4 + 1 + 4).eval()
    pipe = stock(tiny, family, pipeline, **own)
    if "inpaint" in kind:
        mask = torch.zeros(2, 1, 32, 32)
        mask[..., 8:24, 8:24] = 1
        return pipe, {"image": image, "mask_image": mask, "height": 32, "width": 32, "strength": 0.8}
    return pipe, {"image": image, "strength": 0.8}


def render(pipe: DiffusionPipeline, needs: dict[str, object], **settings: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt", "generator": generator}
    return pipe(PROMPTS, **arguments, **needs, **settings).images


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_of_every_kind(tiny: Path, kind: str) -> None:
    """In all timesteps at weight 1 it is the pipeline with the tuned encoder; in none, or undone, the plain one."""
    pipe, needs = build(tiny, kind)
    original, one = pipe.text_encoder, tuned(pipe.text_encoder, 1)
    plain = render(pipe, needs)
    pipe.text_encoder = one
    whole = render(pipe, needs)
    pipe.text_encoder = original
    assert (whole - plain).abs().max() > 5e-3
    with craftor.apply(pipe, {one: 1.0}):
        assert torch.equal(render(pipe, needs), whole)
    assert torch.equal(render(pipe, needs), plain)
    first = 799 if "strength" in needs else 999  # of five steps, strength 0.8 leaves out the noisiest
    with craftor.apply(pipe, {one: {"weight": 1.0, "from": first, "to": first}}):
        started = render(pipe, needs)
    with craftor.apply(pipe, {one: {"weight": 1.0, "from": first - 1, "to": 0}}):
        ended = render(pipe, needs)
    assert not any(torch.equal(image, other) for image in (started, ended) for other in (plain, whole))
    with craftor.apply(pipe, {one: {"weight": 1.0, "from": first - 1, "to": first - 2}}):
        assert torch.equal(render(pipe, needs), plain)
    assert pipe.text_encoder is original


def test_it_undoes_itself(tiny: Path) -> None:
    pipe = stock(tiny, "pipeline")
    kind, one, original = type(pipe), tuned(pipe.text_encoder, 1), pipe.text_encoder
    plain, config = picture(pipe), dict(pipe.config)
    applied = craftor.apply(pipe, {one: 1.0})
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    mixed = picture(pipe)
    with pytest.raises(MixtureError, match="already uses a mixture"):
        craftor.apply(pipe, {one: 0.5})
    with pytest.raises(ValueError, match="divisible by 8"):
        picture(pipe, height=30, width=30)
    assert torch.equal(picture(pipe), mixed)
    applied.remove()
    applied.remove()
    assert type(pipe) is kind and pipe.text_encoder is original and dict(pipe.config) == config
    assert torch.equal(picture(pipe), plain)
    assert one.training is tuned(original, 1).training and all(p.requires_grad for p in one.parameters())


def test_other_callbacks_and_batches_still_work(tiny: Path) -> None:
    """Images per prompt, a user's callback with its own tensors, and one that turns guidance off half way."""
    pipe = stock(tiny, "pipeline")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # timesteps that are no integers
    seen = []

    def note(pipe: DiffusionPipeline, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((index, list(tensors)))
        return tensors

    def stop_guiding(pipe: DiffusionPipeline, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if index == 2:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    settings = {"num_inference_steps": 5, "num_images_per_prompt": 2, "output_type": "pt"}
    one = tuned(pipe.text_encoder, 1)
    with craftor.apply(pipe, {one: {"weight": 0.5, "from": 999, "to": 0}}):
        images = pipe(
            PROMPTS, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["latents"], **settings
        ).images
        assert images.shape == (4, 3, 32, 32)
        assert seen == [(index, ["latents"]) for index in range(5)]
        cut = picture(pipe, callback_on_step_end=stop_guiding, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        assert cut.isfinite().all()


def test_encoders_come_from_folders_and_the_hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's folder, a pipeline's, a hub id in the local cache; without description they act at all timesteps."""
    pipe = stock(tiny, "pipeline")
    one = tuned(pipe.text_encoder, 1)
    with craftor.apply(pipe, {one: 1.0}):
        wanted = picture(pipe)
    one.save_pretrained(tmp_path / "alone")
    one.save_pretrained(tmp_path / "whole" / "text_encoder")
    cached = tmp_path / "hub" / "models--someone--style"
    one.save_pretrained(cached / "snapshots" / ("a" * 40) / "text_encoder")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in (str(tmp_path / "alone"), tmp_path / "whole", "someone/style"):
        with craftor.apply(pipe, {source: 1.0}) as applied:
            assert torch.equal(picture(pipe), wanted)
        assert applied.members[0].window == (999, 0)


def test_what_cannot_be_mixed_is_refused(tiny: Path, tmp_path: Path) -> None:
    pipe = stock(tiny, "pipeline")
    one = tuned(pipe.text_encoder, 1)
    for mix, message in (
        ({one: 1.2}, "weight is 1.2, allowed: 0 to 1"),
        ({one: float("nan")}, "weight is nan"),
        ({one: {"weight": 0.5, "from": 100, "to": 200}}, "acts from 100 to 200, allowed: 999 >= from >= to >= 0"),
        ({one: {"weight": 0.5, "until": 3}}, "expected a weight or"),
        ({one: "much"}, "expected a weight or"),
    ):
        with pytest.raises(MixtureError, match=message):
            craftor.apply(pipe, mix)
    with pytest.raises(EncoderRefused, match="and this pipeline has no text_encoder_2"):
        craftor.apply(pipe, {stock(tiny, "sdxl").text_encoder_2: 1.0})
    with pytest.raises(EncoderRefused, match="hidden_act = 'gelu', the base 'quick_gelu'"):
        craftor.apply(pipe, {stock(tiny, "sd2").text_encoder: 1.0})
    with pytest.raises(EncoderRefused, match="not finite"):
        broken = tuned(one, 2)
        broken.final_layer_norm.weight.data.fill_(float("nan"))
        craftor.apply(pipe, {broken: 1.0})
    with pytest.raises(EncoderRefused, match="no text encoder in safetensors there"):
        craftor.apply(pipe, {"nobody/nothing": 1.0})
    with pytest.raises(BundleError, match="there is no registry in"):
        craftor.apply(pipe, {"aesthetic@champion": 1.0}, runs=tmp_path / "none")
    with pytest.raises(MixtureError, match="give prompt, not prompt_embeds"), craftor.apply(pipe, {one: 1.0}):
        pipe(prompt_embeds=torch.zeros(1, 77, 16))

    class Other(DiffusionPipeline):
        def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> None:
            super().__init__()
            self.register_modules(vae=vae, text_encoder=text_encoder)

    with pytest.raises(MixtureError, match="a Other; allowed: pipelines of Stable Diffusion"):
        craftor.apply(Other(pipe.vae, pipe.text_encoder), {one: 1.0})
    assert type(pipe) is StableDiffusionPipeline
