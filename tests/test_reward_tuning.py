"""One step of tuning by reward: who conditions which step, where the gradient goes, what each sample depends on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from craftor import objective, seeds
from craftor.decode import decode
from craftor.denoise import Prompt, State, sample
from craftor.embed import embed
from craftor.memory import graph_size
from craftor.recipe import Recipe, load
from craftor.solver import add_noise
from craftor.stream import Rows
from craftor.tasks.reward_tuning import RewardTuningTask

PROMPTS = ["a small red star", "a large blue ring", "a large red ring"]


def rows(task: RewardTuningTask, prompts: list[str] = PROMPTS, positions: list[int] | None = None) -> Rows:
    ids = task.diffuser.tokenize(prompts)["text_encoder"].numpy()
    return Rows(positions or list(range(len(prompts))), {"input_ids": ids, "prompt": np.array(prompts, dtype=object)})


def build(recipe: Path, **overrides) -> RewardTuningTask:
    return RewardTuningTask(load(recipe, {key.replace("__", "."): value for key, value in overrides.items()}))


@pytest.fixture
def task(tiny_recipe: Path) -> RewardTuningTask:
    return build(tiny_recipe)


def gradients(task: RewardTuningTask) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}


def condition(encoder: torch.nn.Module, task: RewardTuningTask) -> Prompt:
    ids = task.diffuser.tokenize(["", *PROMPTS])
    found = embed({"text_encoder": encoder}, ids)
    return Prompt(found[1:], found[:1])


def move(task: RewardTuningTask) -> None:
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize(("outside", "before"), [("original", "original"), ("tuned", "tuned")])
def test_the_window_sees_the_trained_encoder_and_other_steps_what_the_recipe_says(
    tiny_recipe: Path, outside: str, before: str
) -> None:
    task = build(tiny_recipe, task__window={"last": 2, "outside": outside})
    move(task)
    with torch.no_grad():
        original = condition(task.diffuser.text_encoder, task).condition.embeds
        tuned = condition(task.module["text_encoder"], task).condition.embeds
    seen = []
    task.diffuser.unet.register_forward_pre_hook(lambda _, args: seen.append(args[2][len(PROMPTS) :].detach().clone()))
    task.step(rows(task))
    who = ["original" if torch.equal(e, original) else "tuned" if torch.allclose(e, tuned) else "?" for e in seen]
    assert who == [before, before, "tuned", "tuned"]


def test_gradient_reaches_the_text_encoder_alone(task: RewardTuningTask) -> None:
    task.step(rows(task))
    task.assert_frozen()
    found = gradients(task)
    assert found.keys() == dict(task.module.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in found.values())


def test_frozen_parts_in_bf16_keep_the_gradients_direction(tiny_recipe: Path) -> None:
    """Decoder and reward towers, each by its own key; what trains stays fp32."""
    reduced = {"model.decoder_precision": "bf16", "task.rewards.clip.options": {"dtype": "bf16"}}
    found = []
    for changes in ({}, reduced):
        task = RewardTuningTask(load(tiny_recipe, changes))
        task.step(rows(task))
        assert task.images is not None and task.images.dtype == torch.float32
        found.append(torch.cat([gradient.flatten() for gradient in gradients(task).values()]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95
    assert not torch.equal(*found)


@pytest.mark.parametrize("null", ["tuned", "tuned_no_grad", "original"])
def test_gradient_is_that_of_one_autograd_graph(tiny_recipe: Path, null: str) -> None:
    task = build(tiny_recipe, task__window={"last": 2, "null": null}, task__anchor=0.3)
    move(task)
    task.step(rows(task))
    found = gradients(task)
    task.module.zero_grad()

    original, tuned = condition(task.diffuser.text_encoder, task), condition(task.module["text_encoder"], task)
    nulls = {"tuned": tuned.null, "tuned_no_grad": tuned.null.detach(), "original": original.null}
    state = State(seeds.normal(7, range(3), "noise", task.diffuser.latent_shape))
    for index in range(task.guided.num_steps):
        inside = index in task.span
        state = task.guided.step(state, Prompt(tuned.condition, nulls[null]) if inside else original, index)
    images = decode(task.diffuser.vae, state.latents)
    scores = {name: reward(images, PROMPTS) for name, reward in task.scoring.rewards.items()}
    anchor = 0.3 * (tuned.condition.embeds - original.condition.embeds).square().mean()
    (anchor - objective.total(scores, task.scoring.weights).mean()).backward()
    for name, parameter in task.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=3e-4, atol=1e-6, msg=name)


def test_null_policies_change_the_gradient_they_name_alone(tiny_recipe: Path) -> None:
    """Before any update the three policies see the same numbers: the images agree, the gradients do not."""
    found = {}
    for null in ("tuned", "tuned_no_grad", "original"):
        task = build(tiny_recipe, task__window={"last": 2, "null": null})
        metrics = task.step(rows(task))
        found[null] = (metrics["total"], gradients(task))
    torch.testing.assert_close(found["tuned"][0], found["original"][0])
    for name, gradient in found["original"][1].items():
        torch.testing.assert_close(gradient, found["tuned_no_grad"][1][name])
    embedding = "text_encoder.text_model.embeddings.position_embedding.weight"
    name = next(key for key in found["tuned"][1] if key.endswith(embedding.split(".", 2)[2]))
    assert not torch.allclose(found["tuned"][1][name], found["original"][1][name])


def test_micro_batches_add_up_to_the_batch(task: RewardTuningTask) -> None:
    task.step(rows(task))
    whole = gradients(task)
    task.module.zero_grad()
    for part in rows(task).split(2):
        task.step(part, share=len(part.position) / 3)
    for name, gradient in gradients(task).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-6)


def test_rewards_one_by_one_are_rewards_summed(task: RewardTuningTask) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    _, gradient = task.scoring(images, PROMPTS, 1.0)
    leaf = images.clone().requires_grad_()
    scores = {name: reward(leaf, PROMPTS) for name, reward in task.scoring.rewards.items()}
    (-objective.total(scores, task.scoring.weights).mean()).backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "window",
    [{"last": 2}, {"preset": "alignprop"}, {"preset": "refl"}, {"preset": "drtune"}, {"preset": "draft_lv"}],
    ids=lambda window: window.get("preset", "last"),
)
def test_a_sample_depends_on_its_prompt_and_index_alone(tiny_recipe: Path, window: dict) -> None:
    task = build(tiny_recipe, task__rollout={"num_steps": 8, "guidance_scale": 3.0}, task__window=window)
    together = task.step(rows(task))
    alone = task.step(rows(task, PROMPTS[1:2], positions=[1]))
    for name, values in together.items():
        torch.testing.assert_close(values[1:2], alone[name], rtol=1e-4, atol=1e-5)


def test_a_copy_takes_the_last_step_as_its_first(tiny_recipe: Path) -> None:
    """DPM-Solver++ reads the step before: a copy, noised to the last step, has none and takes DDIM's."""
    rollout = {"num_steps": 16, "guidance_scale": 3.0, "solver": "dpm_solver_2m"}
    task = build(tiny_recipe, task__rollout=rollout, task__window={"preset": "draft_lv"})
    task.step(rows(task))
    with torch.no_grad():
        prompt = condition(task.module["text_encoder"], task)
        finished = sample(task.guided, State(seeds.normal(7, range(3), "noise", (4, 8, 8))), prompt, range(16)).latents
        ddim = task.diffuser.guided(task.settings.rollout.model_copy(update={"solver": "ddim"}))
        for copy, images in enumerate(task.images.chunk(2)):
            noise = seeds.normal(7, range(3), f"copy {copy}", (4, 8, 8))
            noisy = State(add_noise(ddim.schedule[15], finished, noise))
            wanted = decode(task.diffuser.vae, ddim.step(noisy, prompt, 15).latents)
            torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_give_the_gradient_of_kept_ones(tiny_recipe: Path) -> None:
    found, held = [], []
    for checkpointing in (False, True):
        overrides = {"model__gradient_checkpointing": checkpointing, "task__train": {"text_encoder": {}, "unet": {}}}
        task = build(tiny_recipe, **overrides)
        with graph_size(task.module.parameters()) as encoding:
            task._embed(rows(task))
        with graph_size(task.module.parameters()) as everything:
            task.step(rows(task))
        found.append(gradients(task))
        held.append((encoding.bytes, everything.bytes))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)
    assert held[1][0] < held[0][0] / 2 and held[1][1] < held[0][1] / 2


@pytest.mark.parametrize(("recompute", "num_kept"), [(True, 0), (1, 1), ("auto", 0)])
def test_replayed_steps_give_the_gradient_of_kept_ones(
    tiny_recipe: Path, recompute: bool | int | str, num_kept: int
) -> None:
    kept = build(tiny_recipe)
    kept.step(rows(kept))
    limit = {"memory_limit_gib": 1e-3} if recompute == "auto" else {}
    replayed = build(tiny_recipe, task__window={"last": 2, "recompute": recompute, **limit})
    replayed.step(rows(replayed))
    assert (kept.kept, replayed.kept) == (4, num_kept)
    for name, gradient in gradients(kept).items():
        assert torch.equal(gradient, gradients(replayed)[name]), name


def test_auto_keeps_every_graph_where_memory_allows(tiny_recipe: Path) -> None:
    task = build(tiny_recipe, task__window={"last": 2, "recompute": "auto", "memory_limit_gib": 64})
    task.step(rows(task))
    assert task.kept >= 4


def test_frozen_parts_do_not_change_over_steps(task: RewardTuningTask) -> None:
    parts = (task.diffuser.text_encoder, task.diffuser.unet, task.diffuser.vae)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        task.step(rows(task))
        optimizer.step()
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())


def test_training_raises_the_reward(task: RewardTuningTask) -> None:
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    totals = []
    for _ in range(15):
        optimizer.zero_grad()
        totals.append(task.step(rows(task))["total"].mean().item())
        optimizer.step()
    assert totals[-1] > totals[0]


def test_a_prefix_that_training_changes_cannot_be_computed_apart(tiny_recipe: Path) -> None:
    data = load(tiny_recipe).model_dump(by_alias=True)
    data["task"]["prefix"] = {"mode": "stage"}
    Recipe.model_validate(data)
    for change in ({"train": {"unet": {}}}, {"window": {"last": 2, "outside": "tuned"}}):
        with pytest.raises(ValidationError, match="the prefix changes while the"):
            Recipe.model_validate({**data, "task": {**data["task"], **change}})
