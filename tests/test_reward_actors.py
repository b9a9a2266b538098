"""Rewards on Ray actors: inline scores and gradients, side by side, through kills; failures that say what failed."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import ray
import torch
from pydantic import ValidationError

from craftor import checkpoint, inputs
from craftor.fit import TrainingStopped, fit
from craftor.recipe import Recipe, RecipeError, load
from craftor.reward_actors import (
    Replicas,
    RewardActor,
    RewardFailed,
    connect,
    divide,
    running,
    to_array,
    to_tensor,
)
from craftor.reward_settings import RUNTIME_ENV, Reward
from craftor.run_files import METRICS
from craftor.scoring import ScoreAndGradient, inline
from craftor_rewards import build
from waiting import wait_for

WAIT_SECONDS = 120
PROMPTS = [f"a {colour} star" for colour in ("red", "blue", "green", "yellow", "white")]
# Only actors that are given the path of this module can import it.
SCRIPTED = f"""
import os
import time
from pathlib import Path


class TooBeautiful(Exception):
    pass


class Scripted:
    '''Mean brightness; the first prompt may ask for more. `weights` is a name in a folder shared with the test.'''

    differentiable, needs_prompt = True, True

    def __init__(self, weights):
        self.own, self.folder, self.calls = Path(weights), Path(weights).parent, 0
        self.own.with_suffix(".pid").write_text(str(os.getpid()))
        self.good_calls = int(self.own.read_text()) if self.own.exists() else 1_000_000

    def __call__(self, images, prompts):
        self.calls += 1
        if prompts[0] == "meet":
            self.own.with_suffix(".meets").touch()
            self.wait_for(lambda: len(list(self.folder.glob("*.meets"))) == 2)
        if prompts[0] == "hang once" and not (self.folder / "hanging").exists():
            (self.folder / "hanging").touch()
            self.wait_for(lambda: False)
        if prompts[0] == "hang":
            self.wait_for(lambda: (self.folder / "enough").exists())
        if prompts[0] == "fail" or self.calls > self.good_calls:
            with (self.folder / "failures").open("a") as file:
                file.write("failed\\n")
            raise TooBeautiful("no number is large enough")
        return images.mean((1, 2, 3))

    def wait_for(self, condition):
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < {WAIT_SECONDS}, "waited too long"
            time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module of a user's reward, by which a test and the actors tell each other what happened."""
    folder = tmp_path_factory.mktemp("scripted")
    (folder / "users_rewards.py").write_text(SCRIPTED)
    return folder


def scripted(folder: Path, name: str) -> Reward:
    """A user's reward whose actor alone has its module in the path."""
    path = os.pathsep.join([str(folder), *(str(Path(__file__).parents[1] / root) for root in ("platform", "rewards"))])
    return Reward(
        kind="users_rewards:Scripted",
        weights=str(folder / name),
        weight=1.0,
        placement="actors",
        num_cpus=0.1,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        timeout_seconds=WAIT_SECONDS,
    )


@pytest.fixture(scope="module")
def settings(tiny: Path, shared: Path) -> dict[str, Reward]:
    clip = Reward(
        kind="clip_score", weights=str(tiny / "clip"), weight=1.0, placement="actors", replicas=2, num_cpus=0.1
    )
    pick = clip.model_copy(update={"kind": "pick_score", "weights": str(tiny / "pick"), "replicas": 1})
    left, right = scripted(shared, "left"), scripted(shared, "right")
    return {"clip": clip, "pick": pick, "left": left, "right": right}


@pytest.fixture(scope="module")
def scope(cluster: None, settings: dict[str, Reward]) -> Iterator[str]:
    """Five actors of four rewards, started once."""
    with running(settings) as scope:
        yield scope


@pytest.fixture
def rewards(settings: dict[str, Reward], scope: str) -> dict[str, Replicas]:
    return connect(settings, scope)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_as_inline(found: ScoreAndGradient, settings: Reward, images: torch.Tensor, prompts: list[str]) -> None:
    """Scores, and the gradient for a cotangent of its own for each sample, within 1e-5 of the largest value."""
    cotangent = torch.linspace(-1, 1, len(images))
    expected_scores, expected = inline(build(settings.kind, settings.weights))(images, prompts, cotangent)()
    scores, gradient = found(images, prompts, cotangent)()
    assert gradient is not None and expected is not None and expected.abs().max() > 0
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.ray
def test_scores_and_gradients_are_the_inline_ones(
    rewards: dict[str, Replicas], settings: dict[str, Reward], images: torch.Tensor
) -> None:
    for name in ("clip", "pick"):
        assert rewards[name].differentiable
        assert_as_inline(rewards[name], settings[name], images, PROMPTS)


@pytest.mark.ray
@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_the_number_of_replicas_changes_nothing(
    rewards: dict[str, Replicas], settings: dict[str, Reward], scope: str, images: torch.Tensor, num_images: int
) -> None:
    one = connect({"clip": settings["clip"].model_copy(update={"replicas": 1})}, scope)["clip"]
    assert (len(one.actors), len(rewards["clip"].actors)) == (1, 2)
    for replicas in (one, rewards["clip"]):
        assert_as_inline(replicas, settings["clip"], images[:num_images], PROMPTS[:num_images])


@pytest.mark.ray
def test_without_a_cotangent_only_scores_come_back(
    rewards: dict[str, Replicas], settings: dict[str, Reward], images: torch.Tensor
) -> None:
    scores, gradient = rewards["clip"](images, PROMPTS, None)()
    assert gradient is None
    torch.testing.assert_close(scores, build("clip_score", settings["clip"].weights)(images, PROMPTS).detach())


@pytest.mark.ray
def test_rewards_compute_at_the_same_time(rewards: dict[str, Replicas], images: torch.Tensor) -> None:
    """Neither of the two answers before both have begun."""
    prompts = ["meet", *PROMPTS[1:]]
    waiting = [rewards[name](images, prompts, None) for name in ("left", "right")]
    for wait in waiting:
        torch.testing.assert_close(wait()[0], images.mean((1, 2, 3)))


@pytest.mark.ray
def test_a_call_that_a_killed_actor_was_at_is_made_again(
    rewards: dict[str, Replicas], shared: Path, images: torch.Tensor
) -> None:
    """`kill -9` while the actor computes: another process answers, and later calls find it."""
    wait = rewards["left"](images, ["hang once", *PROMPTS[1:]], torch.ones(5))
    wait_for((shared / "hanging").exists)
    os.kill(int((shared / "left.pid").read_text()), signal.SIGKILL)
    scores, gradient = wait()
    torch.testing.assert_close(scores, images.mean((1, 2, 3)))
    torch.testing.assert_close(gradient, torch.full_like(images, 1 / images[0].numel()))
    again, _ = rewards["left"](images, PROMPTS, None)()
    assert torch.equal(again, scores)


@pytest.mark.ray
def test_a_reward_that_raises_twice_fails_with_its_traceback(
    rewards: dict[str, Replicas], shared: Path, images: torch.Tensor
) -> None:
    with pytest.raises(RewardFailed) as caught:
        rewards["right"](images, ["fail", *PROMPTS[1:]], None)()
    message = str(caught.value)
    assert message.startswith("reward 'right' failed twice on the same images:\n")
    assert (
        "\x1b" not in message and "users_rewards.py" in message and "TooBeautiful: no number is large enough" in message
    )
    assert (shared / "failures").read_text() == "failed\n" * 2
    scores, _ = rewards["right"](images, PROMPTS, None)()  # the actor itself lives
    assert len(scores) == 5


@pytest.mark.ray
def test_an_answer_that_does_not_come_in_time_is_an_error(
    rewards: dict[str, Replicas], shared: Path, images: torch.Tensor
) -> None:
    wait = rewards["left"](images, ["hang", *PROMPTS[1:]], None)
    rewards["left"].timeout = 0.1
    with pytest.raises(RewardFailed, match=r"'left' gave no answer in 0.1 s: .* task\.rewards\.left\.timeout_seconds"):
        wait()
    (shared / "enough").touch()


@pytest.mark.ray
def test_a_reward_that_cannot_start_says_why(settings: dict[str, Reward], cluster: None, tmp_path: Path) -> None:
    missing = settings["clip"].model_copy(update={"weights": str(tmp_path / "nothing"), "replicas": 1})
    before = named_actors()
    with pytest.raises(RewardFailed, match=r"(?s)reward 'clip' did not start:.*nothing"), running({"clip": missing}):
        pytest.fail("it started")
    greedy = settings["clip"].model_copy(update={"num_gpus": 1000.0, "timeout_seconds": 0.5})
    with (
        pytest.raises(
            RewardFailed, match=r"not start in 0.5 s .*2 actors want num_cpus = 0.1 and num_gpus = 1000 each"
        ),
        running({"clip": greedy}),
    ):
        pytest.fail("it started")
    mistaken = settings["clip"].model_copy(update={"runtime_env": {"pip": 3}})
    with pytest.raises(RewardFailed, match=r"its runtime_env is \{'pip': 3\}: .*"), running({"clip": mistaken}):
        pytest.fail("it started")
    assert named_actors() == before


@pytest.mark.ray
def test_a_run_on_actors_is_the_inline_run_until_a_reward_fails(
    cluster: None, tiny_recipe: Path, tmp_path: Path
) -> None:
    """One of four actors that train is killed on the way, and the one that watches fails in step 11.

    The checkpoint stands, and no actor is left.
    """
    short = {"run.num_steps": 12, "run.checkpoint_every": 2, "optimizer.cosine_from": 1.0}
    train(load(tiny_recipe, short), tmp_path / "inline")
    out, before, others = tmp_path / "actors", named_actors(), {process.pid for process in actor_processes()}
    (tmp_path / "users_rewards.py").write_text(SCRIPTED)
    (tmp_path / "watching").write_text("10")  # calls that go well: one a step
    watching = scripted(tmp_path, "watching").model_copy(update={"weight": 0.0, "evaluation_only": True, "every": 1})
    placed = {"task.rewards.watching": watching.model_dump(exclude_none=True), "task.rewards.clip.replicas": 2}
    for name in ("clip", "pick"):
        placed |= {f"task.rewards.{name}.placement": "actors", f"task.rewards.{name}.num_cpus": 0.1}
    killed: list[int] = []

    def kill_one() -> None:
        while not (out / "checkpoints" / "step-000002").exists():
            time.sleep(0.02)
        spared = others | {int((tmp_path / "watching.pid").read_text())}
        process = next(process for process in actor_processes() if process.pid not in spared)
        process.kill()
        killed.append(process.pid)

    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(TrainingStopped, match=r"(?s)'watching' failed twice.*TooBeautiful.*The last checkpoint stands"):
        train(load(tiny_recipe, short | placed), out)
    assert killed
    assert named_actors() == before
    last = checkpoint.latest(out)
    assert last is not None and checkpoint.step_of(last) == 10
    found, expected = lines(out), lines(tmp_path / "inline")
    assert len(found) == 10
    for ours, alone in zip(found, expected, strict=False):
        for name in ("loss", "total", "clip", "pick", "grad_norm"):
            assert ours[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), (ours["step"], name)


def test_a_batch_is_divided_evenly_and_wholly() -> None:
    for num_images in range(1, 9):
        for num_replicas in range(1, 9):
            parts = divide(num_images, num_replicas)
            sizes = [part.stop - part.start for part in parts]
            assert len(parts) == min(num_images, num_replicas)
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
            assert parts[0].start == 0 and parts[-1].stop == num_images
            assert all(before.stop == after.start for before, after in pairwise(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_arrive_as_they_left(dtype: torch.dtype) -> None:
    tensor = torch.rand(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)[:, :, 1:]
    array = to_array(tensor.requires_grad_())
    array.flags.writeable = False
    arrived = to_tensor(array, torch.device("cpu"))
    assert arrived.dtype == dtype and not arrived.requires_grad
    assert torch.equal(arrived, tensor)


def test_a_reward_without_gradient_answers_scores_only(images: torch.Tensor) -> None:
    actor = RewardActor("compressibility", "jpeg", num_cpus=1, num_gpus=0)
    scores, gradient = actor.score(to_array(images), PROMPTS, to_array(torch.ones(5)))
    assert scores.shape == (5,) and gradient is None
    assert not actor.differentiable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 2}, 'placement is "inline" but replicas is 2; .* go with placement = "actors"'),
        ({"num_gpus": 1.0}, 'placement is "inline" but num_gpus is 1.0'),
        ({"runtime_env": {"pip": ["timm"]}}, 'placement is "inline" but runtime_env is'),
        ({"placement": "actors", "replicas": 0}, "greater than or equal to 1"),
        ({"placement": "actors", "num_cpus": -1.0}, "greater than or equal to 0"),
        ({"placement": "actors", "timeout_seconds": 0.0}, "greater than 0"),
        ({"placement": "actors", "runtime_env": {"pipp": []}}, "unknown key pipp; allowed: conda, .*pip, "),
        ({"placement": "elsewhere"}, "Input should be 'inline' or 'actors'"),
    ],
)
def test_what_a_recipe_may_not_say(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Reward(kind="aesthetic", weights="micro:aesthetic", weight=1.0, **changes)


def test_a_misplaced_key_is_named_with_its_recipe(tiny_recipe: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"tiny\.toml: task\.rewards\.pick: placement is \"inline\" but replicas is 3"
    ):
        load(tiny_recipe, {"task.rewards.pick.replicas": 3})


def test_a_recipe_counts_the_processors_of_its_actors(tiny_recipe: Path) -> None:
    assert load(tiny_recipe).num_processes == 0  # it trains in the driver
    pick = {"task.rewards.pick": {"kind": "aesthetic", "weights": "x", "weight": 1.0, "placement": "actors"}}
    three = {"task.rewards.pick.replicas": 3, "task.rewards.pick.num_cpus": 0.5}
    assert load(tiny_recipe, pick | three).num_processes == 2


def test_the_keys_of_a_runtime_env_are_rays() -> None:
    from ray.runtime_env import RuntimeEnv

    code = {"worker_process_setup_hook", "java_jars"}  # not for a recipe, which is data
    assert set(RUNTIME_ENV) == {key for key in RuntimeEnv.known_fields if not key.startswith("_")} - code


def train(recipe: Recipe, out: Path) -> None:
    """A run without MLflow."""
    out.mkdir()
    prepared = inputs.prepare(recipe, out)
    fit(recipe, out, prepared.folder, prepared.num_rows)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def named_actors() -> set[str]:
    """Rewards' actors that Ray knows."""
    return {name for name in ray.util.list_named_actors() if name.startswith("reward/")}


def actor_processes() -> list[psutil.Process]:
    """Those of this Ray, which began it: no other's on the machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(RewardActor.__name__ in part for part in process.cmdline()):
                found.append(process)
    return found
