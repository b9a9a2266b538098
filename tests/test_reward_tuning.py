"""One step of TextCraftor: who conditions which step, where the gradient goes, what each sample depends on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from craftor import objective, seeds
from craftor.decode import decode
from craftor.embed import embed
from craftor.recipe import load
from craftor.stream import Rows
from craftor.tasks.reward_tuning import RewardTuningTask

PROMPTS = ["a small red star", "a large blue ring", "a large red ring"]


def rows(task: RewardTuningTask, prompts: list[str] = PROMPTS, positions: list[int] | None = None) -> Rows:
    ids = task.diffuser.tokenize(prompts).numpy()
    return Rows(positions or list(range(len(prompts))), {"input_ids": ids, "prompt": np.array(prompts, dtype=object)})


@pytest.fixture
def task(tiny_recipe: Path) -> RewardTuningTask:
    return RewardTuningTask(load(tiny_recipe))


def test_prefix_sees_the_original_encoder_and_the_window_the_trained_one(task: RewardTuningTask) -> None:
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.mul_(1.1)
    ids = task.diffuser.tokenize(PROMPTS)
    original, tuned = embed(task.diffuser.text_encoder, ids), embed(task.module, ids)
    seen = []
    task.diffuser.unet.register_forward_pre_hook(lambda _, args: seen.append(args[2][len(PROMPTS) :].detach().clone()))
    task.step(task.module, rows(task))
    who = ["original" if torch.equal(e, original) else "tuned" if torch.allclose(e, tuned) else "?" for e in seen]
    assert who == ["original", "original", "tuned", "tuned"]


def test_gradient_reaches_the_text_encoder_alone(task: RewardTuningTask) -> None:
    task.step(task.module, rows(task))
    task.assert_frozen()
    gradients = {name: p.grad for name, p in task.module.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert sum(gradient.abs().sum() for gradient in gradients.values() if gradient is not None) > 0


def test_gradient_is_that_of_one_autograd_graph(task: RewardTuningTask) -> None:
    task.step(task.module, rows(task))
    found = {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}
    task.module.zero_grad()

    ids = torch.cat([task.null_ids, task.diffuser.tokenize(PROMPTS)])
    original, tuned = embed(task.diffuser.text_encoder, ids), embed(task.module, ids)
    latents = seeds.normal(7, range(3), "noise", task.diffuser.latent_shape)
    for index in range(task.guided.num_steps):
        e = tuned if index in task.window else original
        latents = task.guided.step(latents, e[1:], e[:1], index)
    images = decode(task.diffuser.vae, latents)
    scores = {name: reward(images, PROMPTS) for name, reward in task.rewards.items()}
    (-objective.total(scores, task.weights).mean()).backward()
    for name, parameter in task.module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-4, atol=1e-6, msg=name)


def test_scores_of_a_sample_depend_on_its_prompt_and_index_alone(task: RewardTuningTask) -> None:
    together = task.step(task.module, rows(task))
    alone = task.step(task.module, rows(task, PROMPTS[1:2], positions=[1]))
    for name, values in together.items():
        torch.testing.assert_close(values[1:2], alone[name], rtol=1e-5, atol=1e-6)


def test_frozen_parts_do_not_change_over_steps(task: RewardTuningTask) -> None:
    parts = (task.diffuser.text_encoder, task.diffuser.unet, task.diffuser.vae)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        task.step(task.module, rows(task))
        optimizer.step()
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())


def test_training_raises_the_reward(task: RewardTuningTask) -> None:
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    totals = []
    for _ in range(15):
        optimizer.zero_grad()
        totals.append(task.step(task.module, rows(task))["total"].mean().item())
        optimizer.step()
    assert totals[-1] > totals[0]
