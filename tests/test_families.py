"""Stable Diffusion 1, 2 and XL: rollouts are the stock pipelines', any part trains, wholly or by LoRA, and exports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from craftor import trainable
from craftor.decode import decode
from craftor.denoise import Prompt, State, sample
from craftor.diffuser import load
from craftor.embed import embed
from craftor.recipe import Model, Recipe
from craftor.recipe import load as load_recipe
from craftor.rollout import Rollout
from craftor.stream import Rows
from craftor.tasks.reward_tuning import RewardTuningTask

FAMILIES = {"pipeline": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a small red star", "a large blue ring"]


def stock(folder: Path):
    family = FAMILIES[folder.name]
    extra = {} if family is StableDiffusionXLPipeline else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = family.from_pretrained(folder, **extra)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_is_the_stock_pipelines(tiny: Path, family: str) -> None:
    diffuser = load(Model(path=str(tiny / family)))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = diffuser.guided(Rollout(num_steps=5, guidance_scale=4.0))
    prompt = Prompt(embed(diffuser.encoders, diffuser.tokenize(PROMPTS)), diffuser.null())
    with torch.no_grad():
        images = decode(diffuser.vae, sample(guided, State(noise), prompt, range(5)).latents)
        wanted = stock(tiny / family)(
            PROMPTS, num_inference_steps=5, guidance_scale=4.0, latents=noise, output_type="pt"
        ).images
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=2e-4)


def task(tiny: Path, tiny_recipe: Path, family: str, train: dict, **window) -> RewardTuningTask:
    data = load_recipe(tiny_recipe).model_dump(by_alias=True)
    data["model"]["path"] = str(tiny / family)
    data["task"] |= {"train": train, "window": {"last": 2, **window}}
    return RewardTuningTask(Recipe.model_validate(data))


def rows(task: RewardTuningTask) -> Rows:
    ids = task.diffuser.tokenize(PROMPTS)
    columns = {name.replace("text_encoder", "input_ids"): value.numpy() for name, value in ids.items()}
    return Rows([0, 1], {**columns, "prompt": np.array(PROMPTS, dtype=object)})


CHOICES = [
    ("sd2", {"text_encoder": {}}),
    ("sdxl", {"text_encoder": {}}),
    ("sdxl", {"text_encoder_2": {}}),
    ("sdxl", {"text_encoder": {"method": "lora", "rank": 2}, "text_encoder_2": {"method": "lora", "rank": 2}}),
    ("pipeline", {"unet": {}}),
    ("pipeline", {"text_encoder": {"lr": 1e-3}, "unet": {"method": "lora", "rank": 2}}),
    ("sdxl", {"unet": {"method": "lora", "rank": 2}}),
]


@pytest.mark.parametrize(("family", "train"), CHOICES, ids=[f"{f}-{'-'.join(t)}" for f, t in CHOICES])
def test_every_choice_of_parts_trains_and_loads_again(
    tiny: Path, tiny_recipe: Path, tmp_path: Path, family: str, train: dict
) -> None:
    chosen = task(tiny, tiny_recipe, family, train)
    trained = {name: p for name, p in chosen.module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    before = chosen.step(rows(chosen))["total"]
    assert not [name for name, p in trained.items() if p.grad is None], "trained parameters that no gradient reaches"
    chosen.assert_frozen()
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        after = chosen.step(rows(chosen))["total"]
    assert not torch.equal(before, after)

    chosen.save(tmp_path)
    again = trainable.load(chosen.diffuser, tmp_path)
    assert again.keys() == train.keys()
    for name, part in again.items():
        with torch.no_grad():
            torch.testing.assert_close(
                output(chosen, name, part), output(chosen, name, chosen.module[name]), rtol=1e-4, atol=1e-5
            )


def output(task: RewardTuningTask, name: str, part: torch.nn.Module) -> torch.Tensor:
    """What a part makes of fixed inputs."""
    ids = task.diffuser.tokenize(PROMPTS)
    if name != "unet":
        return part(ids[name], output_hidden_states=True).hidden_states[-2]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = embed(task.diffuser.encoders, ids)
    added = None
    if condition.pooled is not None:
        added = {"text_embeds": condition.pooled, "time_ids": task.guided.time_ids.expand(2, -1)}
    return part(latents, 500, condition.embeds, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", ["pipeline", "sdxl"])
def test_lora_loads_in_the_stock_pipeline(tiny: Path, tiny_recipe: Path, tmp_path: Path, family: str) -> None:
    lora = {"method": "lora", "rank": 2, "alpha": 6}
    chosen = task(tiny, tiny_recipe, family, {"text_encoder": lora, "unet": lora}, outside="tuned")
    with torch.no_grad():
        for parameter in chosen.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.2)
    chosen.save(tmp_path)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    encoders = {**chosen.diffuser.encoders, "text_encoder": chosen.module["text_encoder"]}
    with torch.no_grad():
        prompt = Prompt(embed(encoders, chosen.diffuser.tokenize(PROMPTS)), chosen.diffuser.null(encoders))
        final = sample(chosen.guided, State(noise), prompt, range(4))
        images = decode(chosen.diffuser.vae, final.latents)
    pipeline = stock(tiny / family)
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "pt"}
    base = pipeline(PROMPTS, **arguments).images
    pipeline.load_lora_weights(tmp_path / "lora")
    wanted = pipeline(PROMPTS, **arguments).images
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=5e-4)


def test_the_unet_trains_after_the_encoder(tiny: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    """The paper's second stage: the tuned encoder conditions the window, and does not train."""
    first = task(tiny, tiny_recipe, "pipeline", {"text_encoder": {}})
    with torch.no_grad():
        for parameter in first.module.parameters():
            parameter.mul_(1.1)
    first.save(tmp_path)
    data = load_recipe(tiny_recipe).model_dump(by_alias=True)
    data["model"]["text_encoder"] = str(tmp_path)
    data["task"]["train"] = {"unet": {}}
    second = RewardTuningTask(Recipe.model_validate(data))
    seen = []
    second.module["unet"].register_forward_pre_hook(lambda _, args: seen.append(args[2][len(PROMPTS) :].detach()))
    second.step(rows(second))
    with torch.no_grad():
        tuned = embed({"text_encoder": first.module["text_encoder"]}, first.diffuser.tokenize(PROMPTS)).embeds
    assert [torch.allclose(embeds, tuned, atol=1e-5) for embeds in seen] == [False, False, True, True]
    assert all(p.grad is not None for p in second.module["unet"].parameters())
    # Whoever evaluates, validates or serves the checkpoint draws with both, as it was trained.
    second.save(tmp_path / "second")
    parts = trainable.load(second.diffuser, tmp_path / "second")
    assert parts.keys() == {"text_encoder", "unet"}
    for name, own in first.module["text_encoder"].state_dict().items():
        torch.testing.assert_close(parts["text_encoder"].state_dict()[name], own, msg=name)


def test_what_cannot_train_is_refused(tiny: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this pipeline has no text_encoder_2; allowed: text_encoder, unet"):
        task(tiny, tiny_recipe, "pipeline", {"text_encoder_2": {}})
    with pytest.raises(ValueError, match='"xformers": it needs a CUDA device and this is cpu; allowed here: auto'):
        load(Model(path=str(tiny / "pipeline"), attention="xformers"))
    with pytest.raises(ValueError, match="holds no tuned part"):
        trainable.load(load(Model(path=str(tiny / "pipeline"))), tmp_path)


def test_a_pipeline_that_cannot_train_is_refused(tiny: Path, tmp_path: Path) -> None:
    index = json.loads((tiny / "pipeline" / "model_index.json").read_text())
    for change, message in (
        ({"unet": [None, None]}, "the pipeline lacks unet, needed here"),
        (
            {"_class_name": "FluxPipeline"},
            "a FluxPipeline; allowed: StableDiffusionPipeline, StableDiffusionXLPipeline",
        ),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            load(Model(path=str(tmp_path)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree(tiny: Path, attention: str) -> None:
    latents, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)
    with torch.no_grad():
        found, wanted = (
            load(Model(path=str(tiny / "pipeline"), attention=choice, channels_last=last))
            .unet(latents, 500, embeds)
            .sample
            for choice, last in ((attention, False), ("auto", True))
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_compiled_is_what_runs(tiny: Path, tiny_recipe: Path) -> None:
    """Compiling takes minutes: here only that the UNet that runs, a copy where it trains, is the compiled one."""
    data = load_recipe(tiny_recipe).model_dump(by_alias=True)
    data["model"]["compile"] = True
    data["task"]["train"] = {"unet": {}}
    unet = RewardTuningTask(Recipe.model_validate(data)).module["unet"]
    assert unet._compiled_call_impl is not None
    assert load(Model(path=str(tiny / "pipeline"))).unet._compiled_call_impl is None


def test_rounded_weights_give_the_bits_of_rounding_at_every_call(tiny: Path) -> None:
    diffuser = load(Model(path=str(tiny / "pipeline"), precision="bf16"))
    guided, latents = diffuser.guided(Rollout(num_steps=2)), torch.randn(1, *diffuser.latent_shape)
    prompt = Prompt(diffuser.null(), diffuser.null())
    expected = guided.output(latents, prompt, 500)
    assert diffuser.hold_rounded().unet.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(guided.output(latents, prompt, 500), expected)
