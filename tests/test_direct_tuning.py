"""Direct tuning on image-caption pairs: one guided call from the pair's own noise level, and its reward."""

from pathlib import Path

import numpy as np
import pytest
import torch

from craftor import objective, seeds
from craftor.decode import decode
from craftor.denoise import Prompt
from craftor.embed import embed
from craftor.recipe import Recipe
from craftor.recipe import load as load_recipe
from craftor.stream import Rows
from craftor.tasks.direct_tuning import DirectTuningTask

PROMPTS = ["a small red star", "a large blue ring", "a large red ring"]


def build(tiny_recipe: Path, timesteps: list[int]) -> DirectTuningTask:
    data = load_recipe(tiny_recipe).model_dump(by_alias=True)
    kept = {key: data["task"][key] for key in ("rollout", "rewards")}
    data["task"] = {"kind": "direct_tuning", **kept, "timesteps": timesteps, "anchor": 0.3}
    return DirectTuningTask(Recipe.model_validate(data))


def test_timesteps_that_the_model_does_not_have_are_refused(tiny_recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.timesteps = \[0, 1000\]: this model has timesteps 0 to 999"):
        build(tiny_recipe, [0, 1000])


def test_gradient_is_that_of_the_one_step_prediction(tiny_recipe: Path) -> None:
    task = build(tiny_recipe, [100, 600])
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.mul_(1.1)
    ids = task.diffuser.tokenize(PROMPTS)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    columns = {
        "input_ids": ids["text_encoder"].numpy(),
        "prompt": np.array(PROMPTS, dtype=object),
        "latents": latents.flatten(1).numpy(),
    }
    metrics = task.step(Rows([0, 1, 2], columns))
    task.assert_frozen()
    found = {name: p.grad.clone() for name, p in task.module.named_parameters()}
    task.module.zero_grad()

    noise = seeds.normal(7, range(3), "noise", (4, 8, 8))
    predicted, timesteps = [], []
    abar = task.diffuser.scheduler.alphas_cumprod
    null = embed(task.encoders, task.diffuser.tokenize([""]))
    for row, draw in enumerate(seeds.uniform(7, range(3), "timestep").tolist()):
        timesteps.append(100 + int(draw * 501))
        alpha, sigma = abar[timesteps[-1]].sqrt(), (1 - abar[timesteps[-1]]).sqrt()
        noisy = alpha * latents[row : row + 1] + sigma * noise[row : row + 1]
        condition = embed(task.encoders, task.diffuser.tokenize(PROMPTS[row : row + 1]))
        output = task.guided.output(noisy, Prompt(condition, null), timesteps[-1])
        predicted.append((noisy - sigma * output) / alpha)
    assert len(set(timesteps)) == 3
    images = decode(task.diffuser.vae, torch.cat(predicted))
    scores = {name: reward(images, PROMPTS) for name, reward in task.scoring.rewards.items()}
    total = objective.total(scores, task.scoring.weights)
    torch.testing.assert_close(metrics["total"], total.detach(), rtol=1e-4, atol=1e-5)
    apart = [embed(encoders, ids).embeds for encoders in (task.encoders, task.diffuser.encoders)]
    (0.3 * (apart[0] - apart[1]).square().mean() - total.mean()).backward()
    for name, parameter in task.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
