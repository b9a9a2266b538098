"""Reward-weighted regression: which of a prompt's images are learnt, the loss on them, and that they are made once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from craftor import job, seeds
from craftor.embed import embed
from craftor.recipe import Recipe, RecipeError, load
from craftor.stream import Rows
from craftor.tasks import Task, build, reward_weighted
from craftor.tasks.reward_weighted import RewardWeightedTask
from test_policy_gradient import PROMPTS, gradients, largest, rows, the_same_in_parts
from test_policy_gradient import recipe as policy_recipe

MANY, SEED = 3, 7


def recipe(file: Path, **overrides: object) -> Recipe:
    """The tiny recipe as reward-weighted regression by `Redness`; overrides are of `[task]`."""
    rollout = {"num_steps": 4, "guidance_scale": 3.0}  # of three steps diffusers' second would end beside ours
    settings = {"samples_per_prompt": MANY, "window": {"start": 1, "stop": 3}, "temperature": 0.1}
    return policy_recipe(file, **{"kind": "reward_weighted", "rollout": rollout, **settings, **overrides})


def moved(task: Task) -> RewardWeightedTask:
    """Away from the untrained model, lest the two be taken for each other."""
    assert isinstance(task, RewardWeightedTask)
    with torch.no_grad():
        for parameter in (p for p in task.module.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return task


@pytest.mark.parametrize(
    "overrides",
    [{}, {"train": {"unet": {}}, "drawn_in": 2}],
    ids=["text encoder", "unet, from images made in two steps"],
)
def test_gradient_is_that_of_denoising_the_chosen_image(tiny_recipe: Path, overrides: dict) -> None:
    """Against one autograd graph, with images, noise levels and targets by diffusers' own parts."""
    task = moved(build(recipe(tiny_recipe, **overrides)))
    metrics = task.step(rows(task, [0, 1, 2]))
    task.assert_frozen()
    found = gradients(task)
    assert found and all(gradient.abs().sum() > 0 for gradient in found.values())
    task.module.zero_grad()

    diffuser, scheduler = task.diffuser, DDIMScheduler.from_config(task.diffuser.scheduler.config)
    encoder = dict(task.module.items()).get("text_encoder", diffuser.text_encoder)
    unet = dict(task.module.items()).get("unet", diffuser.unet)
    ids, shape = diffuser.tokenize(PROMPTS), diffuser.latent_shape
    scheduler.set_timesteps(task.weighted.drawn_in or 4)
    made = []
    with torch.no_grad():
        original, null = embed(diffuser.encoders, ids).embeds, diffuser.null().embeds
        for k in range(MANY):
            latents = torch.cat([seeds.normal(SEED, [i], f"noise of sample {k}", shape) for i in range(3)])
            for timestep in scheduler.timesteps:
                empty = diffuser.unet(latents, timestep, null.expand_as(original)).sample
                asked = diffuser.unet(latents, timestep, original).sample
                latents = scheduler.step(empty + 3.0 * (asked - empty), timestep, latents).prev_sample
            made.append(latents)
        pictures = diffuser.vae.decode(torch.cat(made) / diffuser.vae.config.scaling_factor).sample / 2 + 0.5
        red = 20.0 * (pictures[:, 0].clamp(0, 1) - pictures[:, 1].clamp(0, 1)).mean((1, 2)).unflatten(0, (MANY, 3)).T
    torch.testing.assert_close(metrics["total"], red, rtol=1e-3, atol=1e-4)
    chance, drawn = (red / 0.1).softmax(dim=1), seeds.uniform(SEED, range(3), "choice")
    chosen = [next(k for k in range(MANY) if drawn[i] <= chance[i, : k + 1].sum() + 1e-6) for i in range(3)]
    latents = torch.stack([made[chosen[i]][i] for i in range(3)])
    scheduler.set_timesteps(4)
    timesteps = scheduler.timesteps[1:3][(2 * seeds.uniform(SEED, range(3), "noise level")).long()]
    noise = seeds.normal(SEED, range(3), "noise", shape)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    condition = embed({"text_encoder": encoder}, ids).embeds
    error = (unet(noisy, timesteps, condition).sample - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(metrics["loss"][:, 0], error.detach(), rtol=1e-4, atol=1e-6)
    error.mean().backward()
    expected = gradients(task)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-4 * largest(expected), msg=name)


def test_images_are_made_once_and_are_the_same_bits_again(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever prompts are beside them: a worker that goes on in the middle makes those that it needs."""
    first, resumed = (moved(build(recipe(tiny_recipe))) for _ in range(2))
    calls: Counter[int] = Counter()
    draw = RewardWeightedTask._draw

    def counted(task: RewardWeightedTask, wanted: list[Rows]) -> list[reward_weighted.Drawn]:
        assert len(wanted) == task.weighted.prompts_at_once
        calls.update({int(row.columns["index"][0]) for row in wanted})
        return draw(task, wanted)

    monkeypatch.setattr(RewardWeightedTask, "_draw", counted)
    for positions in ([0, 1], [2, 3], [4, 5]):
        first.step(rows(first, positions))
    assert calls == {0: 1, 1: 1, 2: 1}
    first.module.zero_grad()
    expected, found = (task.step(rows(task, [5, 6, 7])) for task in (first, resumed))
    assert calls == {0: 2, 1: 2, 2: 2}
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert all(torch.equal(gradients(resumed)[name], gradient) for name, gradient in gradients(first).items())

    calls.clear()
    monkeypatch.setattr(reward_weighted, "KEPT_BYTES", first.made[0].latents.nbytes)
    cramped = moved(build(recipe(tiny_recipe)))
    for positions in ([0, 1], [3, 4]):
        cramped.step(rows(cramped, positions))
    assert calls == {0: 1, 1: 2}
    calls.clear()
    few = build(recipe(tiny_recipe))
    few.step(rows(few, [0, 1, 2, 3, 4, 5, 6]))
    assert calls == {0: 1, 1: 1, 2: 1}


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_run_that_was_stopped_ends_with_the_same_bits(tiny_recipe: Path, tmp_path: Path) -> None:
    """In the middle of its second pass, over prompts that are no whole number of batches."""
    changes = {"task.kind": "reward_weighted", "task.window": {"first": 2}, "task.temperature": 1.0, "register": None}
    changes |= {"data.max_rows": 6, "run.checkpoint_every": 2, "optimizer.cosine_from": 1.0}
    whole, stopped = tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped"
    job.train(load(tiny_recipe, {**changes, "run.num_steps": 4}), tiny_recipe, whole)
    job.train(load(tiny_recipe, {**changes, "run.num_steps": 2}), tiny_recipe, stopped)
    job.resume(stopped, load(tiny_recipe, {**changes, "run.num_steps": 4}), accept=True)
    found, expected = (
        load_file(run / "checkpoints" / "step-000004" / "text_encoder" / "model.safetensors")
        for run in (stopped, whole)
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_micro_batches_and_workers_change_nothing(tiny_recipe: Path) -> None:
    task = moved(build(recipe(tiny_recipe)))
    whole = the_same_in_parts(task)
    figures = task.observe(whole)
    known = set(task.settings.metrics())
    assert figures.keys() >= {"red", "total", "gap", "chosen", "prompt_diversity"}
    assert {"gap", "chosen", "red"} <= known and not {"clipped", "share/red"} & known
    assert figures["gap"] == pytest.approx(float((whole["total"].amax(1) - whole["total"].amin(1)).mean()))


def test_the_better_an_image_the_likelier_it_is_learnt(tiny_recipe: Path) -> None:
    task = build(recipe(tiny_recipe, temperature=0.5))
    assert isinstance(task, RewardWeightedTask)
    total = torch.tensor([[0.0, 1.0, -1.0]])
    seen = [int(task._choose(rows(task, [3 * i]), total)) for i in range(3000)]
    shares = torch.tensor([seen.count(k) / 3000 for k in range(MANY)])
    torch.testing.assert_close(shares, (total[0] / 0.5).softmax(0), rtol=0, atol=0.03)


def test_it_learns(tiny_recipe: Path) -> None:
    tuned, base = (build(recipe(tiny_recipe, train={"unet": {}})) for _ in range(2))
    optimizer = torch.optim.AdamW(tuned.module.parameters(), lr=5e-3)
    for step in range(40):
        optimizer.zero_grad()
        tuned.step(rows(tuned, [3 * step, 3 * step + 1, 3 * step + 2]))
        optimizer.step()
    other = list(range(300, 360))
    before, after = (float(task.step(rows(task, other))["loss"].mean()) for task in (base, tuned))
    assert after < 0.95 * before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"temperature": 0.0}, "task.temperature: Input should be greater than 0"),
        ({"samples_per_prompt": 1}, "task.samples_per_prompt: Input should be greater than or equal to 2"),
        ({"window": {"last": 2, "null": "original"}}, "the empty prompt never trains here; leave it out"),
        ({"window": {"preset": "refl"}}, "window: jump is for gradients of rewards; allowed here: preset, last"),
        ({"eta": 1.0}, "task.eta: unknown key; allowed here: "),
        ({"composition": {"conflicts": "pcgrad"}}, "need the rewards' gradients; leave them out"),
        ({"composition": {"normalise": True}}, "images are scored once, before there is a spread; leave it out"),
        ({"watched": 2}, "rewards.watched.every: images are made once, and do not change; leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_explained(tiny_recipe: Path, tmp_path: Path, overrides: dict, message: str) -> None:
    import tomli_w

    data = recipe(tiny_recipe).data_of()
    if every := overrides.pop("watched", None):
        watched = {**data["task"]["rewards"]["red"], "weight": 0.0, "evaluation_only": True, "every": every}
        data["task"]["rewards"]["watched"] = watched
    data["task"] |= overrides
    file = tmp_path / "wrong.toml"
    file.write_text(tomli_w.dumps(data))
    with pytest.raises(RecipeError) as error:
        load(file)
    assert message in str(error.value)
