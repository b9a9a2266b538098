"""Learning from a prompt's best and worst images: which they are, the losses on them, and what they teach."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from craftor import seeds
from craftor.embed import embed
from craftor.recipe import Recipe, RecipeError, load
from craftor.tasks import Task, build
from craftor.tasks.ranked_tuning import RankedTuningTask
from test_policy_gradient import PROMPTS, gradients, largest, rows
from test_policy_gradient import recipe as policy_recipe

MANY = 3
BOTH = {"best_weight": 0.5, "preference_weight": 0.25, "beta": 20.0}


def recipe(file: Path, **overrides: object) -> Recipe:
    """The tiny recipe as ranked tuning by `Redness`; overrides are of `[task]`."""
    rollout = {"num_steps": 4, "guidance_scale": 3.0}  # of three steps diffusers' second would end beside ours
    data = {"rollout": rollout, "samples_per_prompt": MANY, "window": {"start": 1, "stop": 3}, "levels": 2, **overrides}
    return policy_recipe(file, kind="ranked_tuning", **data)


def moved(task: Task) -> Task:
    """Away from the untrained model: there, nothing is preferred yet."""
    with torch.no_grad():
        for parameter in (p for p in task.module.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return task


@pytest.mark.parametrize(
    "overrides",
    [{}, BOTH, {**BOTH, "best_weight": 0.0, "train": {"unet": {}}}],
    ids=["best", "both, text encoder", "preference, unet"],
)
def test_gradient_is_that_of_denoising_the_best_and_not_the_worst(tiny_recipe: Path, overrides: dict) -> None:
    """Against one autograd graph, with images, noise levels and targets by diffusers' own pipeline parts."""
    task = moved(build(recipe(tiny_recipe, **overrides)))
    assert isinstance(task, RankedTuningTask)
    metrics = task.step(rows(task, [0, 1, 2]))
    task.assert_frozen()
    found = gradients(task)
    assert found and all(gradient.abs().sum() > 0 for gradient in found.values())
    task.module.zero_grad()

    diffuser, scheduler = task.diffuser, DDIMScheduler.from_config(task.diffuser.scheduler.config)
    encoder = dict(task.module.items()).get("text_encoder", diffuser.text_encoder)
    unet = dict(task.module.items()).get("unet", diffuser.unet)
    ids = diffuser.tokenize(PROMPTS)
    with torch.no_grad():
        original, null = embed(diffuser.encoders, ids).embeds, diffuser.null().embeds
        made = []
        for k in range(MANY):
            latents = seeds.normal(7, range(3), f"noise of sample {k}", diffuser.latent_shape)
            scheduler.set_timesteps(4)
            for timestep in scheduler.timesteps:
                empty = diffuser.unet(latents, timestep, null.expand_as(original)).sample
                asked = diffuser.unet(latents, timestep, original).sample
                latents = scheduler.step(empty + 3.0 * (asked - empty), timestep, latents).prev_sample
            made.append(latents)
        total = metrics["total"]
        best = torch.stack([made[int(total[i].argmax())][i] for i in range(3)])
        worst = torch.stack([made[int(total[i].argmin())][i] for i in range(3)])
        assert task.images is not None
        pictures = diffuser.vae.decode(torch.cat(made) / diffuser.vae.config.scaling_factor).sample / 2 + 0.5
        torch.testing.assert_close(pictures.clamp(0, 1), task.images, rtol=1e-3, atol=1e-4)
    settings, loss = task.ranked, torch.zeros(())
    for level in range(2):  # of two steps in the window, each level has one
        timestep = torch.tensor([int(scheduler.timesteps[1 + level])] * 3)
        noise = seeds.normal(7, range(3), f"noise at level {level}", diffuser.latent_shape)

        def error(latents: torch.Tensor, part: torch.nn.Module, condition: torch.Tensor) -> torch.Tensor:
            predicted = part(scheduler.add_noise(latents, noise, timestep), timestep, condition).sample  # noqa: B023
            return (predicted - noise).square().mean((1, 2, 3))  # noqa: B023

        condition = embed({"text_encoder": encoder}, ids).embeds
        with torch.no_grad():
            before = [error(latents, diffuser.unet, original) for latents in (best, worst)]
        now = [error(latents, unet, condition) for latents in (best, worst)]
        margin = (now[0] - before[0]) - (now[1] - before[1])
        preference = torch.log1p(torch.exp(settings.beta * margin))
        loss = loss + (settings.best_weight * now[0] + settings.preference_weight * preference).mean() / 2
    torch.testing.assert_close(metrics["loss"].mean(), loss.detach(), rtol=1e-4, atol=1e-6)
    loss.backward()
    expected = gradients(task)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-4 * largest(expected), msg=name)


def test_micro_batches_and_workers_change_nothing(tiny_recipe: Path) -> None:
    task = moved(build(recipe(tiny_recipe, **BOTH)))
    whole = task.step(rows(task, [3, 4, 5]))
    expected = gradients(task)
    task.module.zero_grad()
    parts = [task.step(rows(task, [3]), 1 / 3), task.step(rows(task, [4, 5]), 2 / 3)]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values, rtol=1e-3, atol=1e-4, msg=name)
    for name, gradient in gradients(task).items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=1e-5 * largest(expected), msg=name)
    figures = task.observe(whole)
    assert figures.keys() >= {"red", "total", "gap", "preferred", "prompt_diversity"}
    assert figures["gap"] == pytest.approx(float((whole["total"].amax(1) - whole["total"].amin(1)).mean()))
    assert 0 <= figures["preferred"] <= 1
    assert {name for name in figures if name in ("gap", "preferred", "red")} <= set(task.settings.metrics())
    assert not {"clipped", "share/red"} & set(task.settings.metrics())


def test_the_best_comes_to_be_preferred(tiny_recipe: Path) -> None:
    task = build(recipe(tiny_recipe, preference_weight=1.0, best_weight=0.0, beta=500.0))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-3)
    losses, preferred = [], []
    for _ in range(12):
        optimizer.zero_grad()
        metrics = task.step(rows(task, [0, 1, 2]))
        losses.append(float(metrics["loss"].mean()))
        preferred.append(float(metrics["preferred"].mean()))
        optimizer.step()
    assert losses[0] == pytest.approx(float(-F.logsigmoid(torch.tensor(0.0)))) and preferred[0] == 0
    assert losses[-1] < 0.9 * losses[0] and preferred[-1] > 0.8


def test_a_levels_part_of_the_window_is_its_own(tiny_recipe: Path) -> None:
    """Over many samples every step of the window is learnt equally often, and by no level but that of its part."""
    task = build(recipe(tiny_recipe, window={"first": 3}, levels=3))
    assert isinstance(task, RankedTuningTask)
    seen: list[list[int]] = []
    call = task.guided.unet.forward
    task.guided.unet.forward = lambda x, t, *rest, **more: (  # type: ignore[method-assign, assignment]
        seen.append(t.tolist() if isinstance(t, torch.Tensor) else []),
        call(x, t, *rest, **more),
    )[1]
    task.step(rows(task, [0, 1, 2]))
    levels = [timesteps for timesteps in seen if timesteps]
    assert levels == [[t] * 3 for t in task.timesteps.tolist()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"best_weight": 0.0}, "best_weight and preference_weight are 0: nothing is learnt"),
        ({"samples_per_prompt": 1}, "task.samples_per_prompt: Input should be greater than or equal to 2"),
        ({"window": {"last": 2, "null": "original"}}, "the empty prompt never trains here; leave it out"),
        ({"window": {"preset": "refl"}}, "window: jump is for gradients of rewards; allowed here: preset, last"),
        ({"eta": 1.0}, "task.eta: unknown key; allowed here: "),
        ({"composition": {"conflicts": "pcgrad"}}, "need the rewards' gradients; allowed: normalise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_explained(tiny_recipe: Path, tmp_path: Path, overrides: dict, message: str) -> None:
    import tomli_w

    data = recipe(tiny_recipe).data_of()
    data["task"] |= overrides
    file = tmp_path / "wrong.toml"
    file.write_text(tomli_w.dumps(data))
    with pytest.raises(RecipeError) as error:
        load(file)
    assert message in str(error.value)
