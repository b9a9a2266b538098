"""Policy gradients: exact densities, the score function's gradient, groups, importance ratios, any reward."""

import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from craftor import seeds
from craftor.advantages import PromptBaselines, group_relative
from craftor.decode import decode
from craftor.denoise import Prompt
from craftor.embed import embed
from craftor.image_statistics import PROMPT
from craftor.recipe import Recipe, RecipeError, load
from craftor.solver import schedule
from craftor.stochastic import divergence, log_prob, log_ratio, noisy
from craftor.stream import Rows
from craftor.tasks import Task, build
from craftor.tasks.policy_gradient import PolicyGradientTask
from craftor_micro.captions import Description, read_claims
from craftor_micro.oracle import RefereeAccuracy

PROMPTS = ["a small red star", "a large blue ring", "a large red ring"]
MANY = 3


class Redness:
    """A reward without gradient whose scores are easy to tell apart."""

    differentiable, needs_prompt = False, False

    def __init__(self, weights: str, sharpness: float = 1.0) -> None:
        self.sharpness = sharpness

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.sharpness * (images[:, 0] - images[:, 1]).mean((1, 2))


def recipe(file: Path, **overrides: object) -> Recipe:
    """The tiny recipe as a policy gradient by `Redness`; overrides are of `[task]`."""
    data = load(file).data_of()
    reward = {"kind": f"{__name__}:Redness", "weights": "none", "weight": 2.0, "options": {"sharpness": 10.0}}
    data["task"] = {
        "kind": "policy_gradient",
        "rollout": {"num_steps": 3, "guidance_scale": 3.0},
        "rewards": {"red": reward},
        "samples_per_prompt": MANY,
        **overrides,
    }
    data["run"] |= {"batch_size": 3}
    return Recipe.model_validate(data)


def rows(task: Task, positions: list[int]) -> Rows:
    prompts = [PROMPTS[position % 3] for position in positions]
    ids = task.diffuser.tokenize(prompts)["text_encoder"].numpy()
    index = np.array([position % 3 for position in positions])
    return Rows(positions, {"input_ids": ids, "index": index, "prompt": np.array(prompts, dtype=object)})


def gradients(task: Task) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}


def largest(found: dict[str, torch.Tensor]) -> float:
    """What rounding is measured against: some weights, such as the biases of keys, have no gradient but rounding."""
    return max(float(gradient.abs().max()) for gradient in found.values())


@pytest.fixture
def latents() -> Callable[[int], torch.Tensor]:
    return lambda seed: torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_densities_are_those_of_torchs_gaussian(latents: Callable[[int], torch.Tensor]) -> None:
    mean, old, noise, deviation = latents(0), latents(0) + 0.01 * latents(1), latents(2), 0.3
    sample = old + deviation * noise
    found, before = log_prob(sample, mean, deviation), log_prob(sample, old, deviation)
    torch.testing.assert_close(found, Normal(mean, deviation).log_prob(sample).sum((1, 2, 3)))
    torch.testing.assert_close(log_ratio(mean, old, noise, deviation), found - before)
    torch.testing.assert_close(
        divergence(mean, old, deviation), kl_divergence(Normal(mean, deviation), Normal(old, deviation)).sum((1, 2, 3))
    )
    assert torch.equal(log_ratio(old, old, noise, deviation), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_steps_are_diffusers_ddim_with_the_same_noise(
    latents: Callable[[int], torch.Tensor], prediction: str, eta: float
) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        rescale_betas_zero_snr=prediction == "v_prediction",
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(10)
    sample, output, noise = latents(0), latents(1), latents(2)
    for timestep, step in zip(scheduler.timesteps.tolist(), schedule(scheduler, "ddim", 10), strict=True):
        one = noisy(step, eta)
        assert one.step.timestep == timestep and (one.deviation > 0) == (eta > 0)
        expected = scheduler.step(output, timestep, sample, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(one.mean(sample, output) + one.deviation * noise, expected, rtol=1e-6, atol=1e-6)
        if eta == 0:
            torch.testing.assert_close(one.step.keep, step.keep)
            torch.testing.assert_close(one.step.new, step.new, rtol=1e-6, atol=1e-9)


def test_advantages_compare_a_sample_with_others_of_its_prompt() -> None:
    totals = torch.tensor([[1.0, 2.0, 3.0], [100.0, 101.0, 102.0], [5.0, 5.0, 5.0]])
    found = group_relative(totals)
    torch.testing.assert_close(found[0], torch.tensor([-1.5, 0.0, 1.5]).mul((2 / 3) ** 0.5))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert (found[2] == 0).all()

    baselines = PromptBaselines(min_count=4, memory=1000)
    assert baselines.needs_start and (baselines(totals, torch.arange(3.0)) == 0).all()
    for _ in range(2):
        baselines.observe(totals, torch.arange(3.0))
    known = totals[0].double()
    expected = (totals[0] - known.mean()) / known.std(correction=0)
    torch.testing.assert_close(baselines(totals, torch.arange(3.0))[0], expected.float())
    everything = totals.double().flatten()
    unseen = (totals[:1] - everything.mean()) / everything.std(correction=0)
    torch.testing.assert_close(baselines(totals[:1], torch.tensor([9.0])), unseen.float(), rtol=1e-4, atol=1e-4)
    again = PromptBaselines(min_count=4, memory=1000)
    again.restore(json.loads(json.dumps(baselines.state())))
    assert torch.equal(again(totals, torch.arange(3.0)), baselines(totals, torch.arange(3.0)))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"window": {"start": 1, "stop": 2}, "eta": 0.5, "same_noise": True},
        {"train": {"unet": {}}, "kl_weight": 0.3},
        {"train": {"unet": {"method": "lora"}, "text_encoder": {"method": "lora"}}},
    ],
    ids=["text encoder", "one step, one noise, original outside", "unet, kl", "lora of both"],
)
def test_gradient_is_the_score_functions(tiny_recipe: Path, overrides: dict) -> None:
    """Against one autograd graph over torch's own Gaussians: -mean(A * sum log p) + weight * KL, and nothing else."""
    task = build(recipe(tiny_recipe, **overrides))
    assert isinstance(task, PolicyGradientTask)
    with torch.no_grad():  # or the trained model is the base, and the divergence without gradient
        for parameter in (p for p in task.module.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    metrics = task.step(rows(task, [0, 1, 2]))
    task.assert_frozen()
    found = gradients(task)
    assert found and all(gradient.abs().sum() > 0 for gradient in found.values())
    task.module.zero_grad()

    assert task.images is not None
    scores = 2.0 * Redness("", 10.0)(task.images, PROMPTS).unflatten(0, (MANY, 3)).T
    torch.testing.assert_close(metrics["total"], scores)
    advantage = group_relative(scores)
    known = {**task.diffuser.encoders, **dict(task.module.items())}
    encoders = {name: known[name] for name in task.diffuser.encoders}
    prompts = [
        Prompt(embed(e, task.diffuser.tokenize(PROMPTS)), embed(e, task.diffuser.tokenize([""])))
        for e in (encoders, task.diffuser.encoders)
    ]
    base = replace(task.guided, unet=task.diffuser.unet)
    loss, shape = torch.zeros(()), task.diffuser.latent_shape
    images = []
    for k in range(MANY):
        latents = seeds.normal(7, range(3), f"noise of sample {0 if task.policy.same_noise else k}", shape)
        for index, step in enumerate(task.guided.schedule):
            if index not in task.noisy:
                with torch.no_grad():
                    latents = step.advance(
                        latents, step.x0(latents, task.guided.output(latents, prompts[1], step.timestep)), None
                    )
                continue
            one = task.noisy[index]
            mean = one.mean(latents, task.guided.output(latents, prompts[0], step.timestep))
            policy = Normal(mean, one.deviation)
            taken = (mean + one.deviation * seeds.normal(7, range(3), f"action {index} of sample {k}", shape)).detach()
            loss = loss - (advantage[:, k] * policy.log_prob(taken).sum((1, 2, 3))).mean() / MANY
            with torch.no_grad():
                there = one.mean(latents, base.output(latents, prompts[1], step.timestep))
            between = kl_divergence(policy, Normal(there, one.deviation)).sum((1, 2, 3))
            loss = loss + task.policy.kl_weight * between.mean() / MANY
            latents = taken
        images.append(decode(task.diffuser.vae, latents))
    torch.testing.assert_close(torch.cat(images), task.images, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected = gradients(task)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-5 * largest(expected), msg=name)


def the_same_in_parts(task: Task) -> dict[str, torch.Tensor]:
    """A batch's metrics, once it has been seen that its parts have the same, and the same gradient."""
    whole = task.step(rows(task, [3, 4, 5]))
    expected = gradients(task)
    task.module.zero_grad()
    parts = [task.step(rows(task, [3]), 1 / 3), task.step(rows(task, [4, 5]), 2 / 3)]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values, rtol=1e-3, atol=1e-4, msg=name)
    for name, gradient in gradients(task).items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=1e-5 * largest(expected), msg=name)
    return whole


def test_micro_batches_and_workers_change_nothing(tiny_recipe: Path) -> None:
    task = build(recipe(tiny_recipe, kl_weight=0.1))
    whole = the_same_in_parts(task)
    figures = task.observe(whole)
    assert {"red", "total", "kl", "clipped", "prompt_diversity"} <= figures.keys() and figures["prompt_diversity"] > 0
    assert figures["red"] == pytest.approx(whole["red"].mean().item())


def test_ratios_weigh_what_an_older_policy_has_sampled(tiny_recipe: Path) -> None:
    lagging = build(recipe(tiny_recipe, updates_per_rollout=2, clip_range=1e-4))
    fresh = build(recipe(tiny_recipe, clip_range=1e-4))
    assert isinstance(lagging, PolicyGradientTask)
    first = lagging.step(rows(lagging, [0, 1, 2]))
    torch.testing.assert_close(first["total"], fresh.step(rows(fresh, [0, 1, 2]))["total"])
    assert (first["clipped"] == 0).all()
    with torch.no_grad():
        for task in (lagging, fresh):
            for parameter in task.module.parameters():
                parameter.mul_(1.05)
    untouched = build(recipe(tiny_recipe))
    second = lagging.step(rows(lagging, [3, 4, 5]))
    torch.testing.assert_close(second["total"], untouched.step(rows(untouched, [3, 4, 5]))["total"])
    assert (second["clipped"] > 0).any()
    third = lagging.step(rows(lagging, [6, 7, 8]))
    torch.testing.assert_close(third["total"], fresh.step(rows(fresh, [6, 7, 8]))["total"])
    assert (third["clipped"] == 0).all()


def test_baselines_of_prompts_start_from_a_batch_and_go_into_checkpoints(tiny_recipe: Path) -> None:
    task = build(recipe(tiny_recipe, advantage="prompt", samples_per_prompt=2, min_count=2))
    assert task.needs_start
    task.observe(task.step(rows(task, [0, 1, 2])))
    assert not task.needs_start
    metrics = task.step(rows(task, [3, 4, 5]))
    assert (metrics["loss"] != 0).all() and metrics[PROMPT].shape == (3, 2)
    again = build(recipe(tiny_recipe, advantage="prompt", samples_per_prompt=2, min_count=2))
    again.restore(json.loads(json.dumps(task.state())))
    torch.testing.assert_close(again.step(rows(again, [3, 4, 5]))["loss"], metrics["loss"])


def test_a_reward_without_gradient_needs_a_policy(tiny_recipe: Path) -> None:
    data = load(tiny_recipe).data_of()
    data["task"]["rewards"]["bytes"] = {"kind": "compressibility", "weights": "jpeg", "weight": 1.0}
    with pytest.raises(ValueError, match=r'bytes: not differentiable.* task.kind = "policy_gradient"'):
        build(Recipe.model_validate(data))


def test_a_scorer_behind_http_trains(tiny_recipe: Path) -> None:
    asked = []

    class Scorer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = json.dumps({"scores": [float(len(image)) for image in asked[-1]["images"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Scorer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = {"kind": "http", "weights": f"http://127.0.0.1:{server.server_port}", "weight": 1.0}
        task = build(recipe(tiny_recipe, rewards={"remote": {**remote, "options": {"timeout": 5.0, "num_retries": 0}}}))
        metrics = task.step(rows(task, [0, 1, 2]))
        server.shutdown()
    assert len(asked) == 1 and asked[0]["prompts"] == PROMPTS * MANY
    assert metrics["remote"].shape == (3, MANY) and any(p.grad.abs().sum() > 0 for p in task.module.parameters())
    with pytest.raises(ConnectionError, match="failed 1 times"):
        task.step(rows(task, [3, 4, 5]))
    with pytest.raises(ValueError, match="reward 'http' has no option 'patience'; it takes: timeout, num_retries"):
        build(recipe(tiny_recipe, rewards={"remote": {**remote, "options": {"patience": 5.0}}}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"samples_per_prompt": 1}, "compares a prompt's samples; allowed: samples_per_prompt >= 2"),
        ({"window": {"preset": "refl"}}, "window: jump is for gradients of rewards; allowed here: preset, last"),
        ({"window": {"random_last": [1, 2]}}, "window: random_last is for gradients of rewards"),
        ({"rollout": {"solver": "dpm_solver_2m"}}, "has no stochastic steps; allowed: ddim, euler"),
        ({"prefix": {"mode": "stage"}, "window": {"last": 1}}, "holds one sample a prompt; allowed: worker"),
        ({"composition": {"conflicts": "pcgrad"}}, "need the rewards' gradients; leave them out"),
        ({"eta": 0.0}, "task.eta: Input should be greater than 0"),
        ({"updates_per_rollout": 3}, "run.checkpoint_every = 4 is not a multiple of task.updates_per_rollout = 3"),
        ({"etta": 1.0}, "task.etta: unknown key; allowed here: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_explained(tiny_recipe: Path, tmp_path: Path, overrides: dict, message: str) -> None:
    import tomli_w

    data = recipe(tiny_recipe).data_of()
    del data["task"]["window"]
    data["task"] |= overrides
    file = tmp_path / "wrong.toml"
    file.write_text(tomli_w.dumps(data))
    with pytest.raises(RecipeError) as error:
        load(file)
    assert message in str(error.value)


def test_captions_say_what_they_were_made_of() -> None:
    held_out = Path(__file__).parents[1] / "platform/craftor_micro/prompts/held_out.jsonl"
    for line in map(json.loads, held_out.read_text().splitlines()):
        assert read_claims(line["prompt"]) == Description.from_json(line["description"]), line["prompt"]
    with pytest.raises(ValueError, match="no word 'dragon'"):
        read_claims("a red dragon")
    with pytest.raises(ValueError, match="names 0 shapes"):
        read_claims("a red background")


def test_the_oracle_scores_the_share_of_claims_that_are_right(tiny_recipe: Path) -> None:
    from craftor.locate import locate
    from craftor_micro.captions import describe, write
    from craftor_micro.render import render
    from craftor_micro.world import sample_scenes

    scenes = sample_scenes(12, 5)
    prompts = [write(said, random.Random(0)) for said in describe(scenes)]
    images, oracle = render(scenes, seed=1), RefereeAccuracy(locate("micro:referee"))
    right, wrong = oracle(images, prompts), oracle(images.flip(0), prompts)
    assert right.mean() > 0.95 and wrong.mean() < 0.7 and ((wrong >= 0) & (wrong <= 1)).all()
    oracles = {"truth": {"kind": "referee_accuracy", "weights": "micro:referee", "weight": 1.0}}
    found = recipe(tiny_recipe, rewards=oracles).task
    assert found.oracle_trains and found.rewards["truth"].kind == "craftor_micro.oracle:RefereeAccuracy"
