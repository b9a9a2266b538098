"""Reward tuning with an object beside half of the prompts, and tuned encoders that read a customizer's prompt."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from craftor import customize, preflight, registry
from craftor.customize import Guidance
from craftor.denoise import Chain, Prompt, State
from craftor.description import describe
from craftor.diffuser import Diffuser
from craftor.embed import Condition, mix
from craftor.encoders import load_encoder
from craftor.mixture import MixtureError
from craftor.object_settings import ShownObject
from craftor.plan import plan
from craftor.recipe import Recipe, RecipeError
from craftor.recipe import load as load_recipe
from craftor.shown_objects import ShownObjects
from craftor.stream import Rows
from craftor.tasks.object_encoder import ObjectEncoderTask
from craftor.tasks.reward_tuning import RewardTuningTask
from craftor_rewards.features import build_features
from encoder_bundles import make_bundle

PROMPTS = ["a small red star", "a large blue ring", "a small blue star", "a large red ring"]


@pytest.fixture
def encoder(tiny: Path, tmp_path: Path) -> Path:
    """A bundle of an object encoder with an object that has a say, beside a UNet that is the base's."""
    recipe = Recipe.model_validate(
        {
            "name": "objects",
            "model": {"path": f"{tiny}/pipeline"},
            "data": {"path": str(tmp_path)},
            "task": {"kind": "object_encoder", "image_encoder": f"{tiny}/clip", "unet": "frozen"},
            "optimizer": {"lr": 1e-2},
            "run": {"num_steps": 1, "batch_size": 4},
        }
    )
    task = ObjectEncoderTask(recipe)
    _disturb(task.module, 0.5)
    task.save(tmp_path / "saved")
    return registry.write_bundle(recipe, task.diffuser, tmp_path / "saved", tmp_path / "object_bundle")


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Five rows, three of them with an object."""
    folder, rng = tmp_path / "references", np.random.default_rng(0)
    folder.mkdir()
    pixels = [rng.integers(0, 255, 3 * 32 * 32).astype(np.uint8) for _ in range(5)]
    table = pa.table({"domain": [False, True, True, False, True], "reference": pixels})
    pyarrow.parquet.write_table(table, folder / "0.parquet")
    return folder


def _disturb(module: nn.Module, by: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def _task(recipe_file: Path, **shown: object) -> RewardTuningTask:
    return RewardTuningTask(load_recipe(recipe_file, {"task.shown": shown} if shown else {}))


def _rows(diffuser: Diffuser, first: int = 0) -> Rows:
    ids = diffuser.tokenize(PROMPTS)["text_encoder"].numpy()
    return Rows(list(range(first, first + 4)), {"prompt": np.array(PROMPTS, dtype=object), "input_ids": ids})


def test_samples_without_an_object_are_those_of_the_base(tiny_recipe: Path, encoder: Path, references: Path) -> None:
    plain = _task(tiny_recipe)
    task = _task(tiny_recipe, encoder=str(encoder), references=str(references), share=0.5)
    seen = task.shown(list(range(400)))
    on = seen.flatten(1).abs().amax(1) > 0
    assert 0.4 < on.float().mean() < 0.6
    assert len({tuple(row.flatten()[:4].tolist()) for row in seen[on]}) == 3, "each reference is shown"
    first = next(i for i in range(0, 400, 4) if on[i : i + 4].sum() == 2)
    on = on[first : first + 4]
    plain.step(_rows(plain.diffuser, first))
    task.step(_rows(task.diffuser, first))
    differ = (task.images - plain.images).flatten(1).abs().amax(1)
    assert (differ[~on] < 1e-5).all() and (differ[on] > 1e-3).all()


def test_the_text_encoder_learns_of_pictures_with_an_object(tiny_recipe: Path, encoder: Path, references: Path) -> None:
    gradients = {}
    for name, share in (("none", 0.0), ("all", 1.0)):
        shown = {"encoder": str(encoder), "references": str(references), "share": share}
        task = _task(tiny_recipe, **shown) if share else _task(tiny_recipe)
        task.step(_rows(task.diffuser))
        task.assert_frozen()
        gradients[name] = torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
        assert gradients[name].isfinite().all() and gradients[name].abs().max() > 0
        if task.shown:
            assert all(p.grad is None for p in task.shown.unet.parameters())
    assert (gradients["all"] - gradients["none"]).norm() > 0.05 * gradients["none"].norm()


def test_identity_is_a_reward_among_the_others(tiny: Path, tiny_recipe: Path, encoder: Path, references: Path) -> None:
    """Its scores are cosines with what was shown, 0 where nothing was; it moves the encoder and adds to the total."""
    shown = {"encoder": str(encoder), "references": str(references), "share": 0.5}
    plain = _task(tiny_recipe, **shown)
    task = _task(tiny_recipe, **shown, identity={"weights": f"{tiny}/pick", "weight": 5.0, "scale": 2.0})
    first = next(i for i in range(0, 400, 4) if plain.shown.shown_to(range(i, i + 4))[1].sum() == 2)
    before, after = (t.step(_rows(t.diffuser, first)) for t in (plain, task))
    assert torch.equal(task.images, plain.images)
    on = task.shown.shown_to(range(first, first + 4))[1]
    look = build_features(f"{tiny}/pick")
    cosines = (look(task.images) * look(task.shown.shown_to(range(first, first + 4))[0])).sum(1)
    torch.testing.assert_close(after["identity"], torch.where(on, cosines, 0.0))
    torch.testing.assert_close(after["total"], before["total"] + 10 * after["identity"])
    assert "identity" not in before and after["cosine/clip/identity"].isfinite().any()
    gradients = [
        torch.cat([p.grad.flatten() for p in t.module.parameters() if p.grad is not None]) for t in (plain, task)
    ]
    assert (gradients[1] - gradients[0]).norm() > 0.01 * gradients[0].norm()
    task.assert_frozen()
    settings = load_recipe(
        tiny_recipe, {"task.shown": {**shown, "identity": {"weights": f"{tiny}/pick", "weight": 5.0}}}
    )
    told = describe(settings, task.diffuser)["rewards"]
    assert told["identity"] == {"kind": "identity", "weight": 5.0} and "clip" in told
    assert "identity" in settings.task.metrics()

    images = task.images.repeat(2, 1, 1, 1).requires_grad_()
    scores = task.shown.likeness(images, PROMPTS * 2)
    torch.testing.assert_close(scores[:4], scores[4:])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert ((gradient.flatten(1).abs().amax(1) > 0) == on.repeat(2)).all()


def test_the_gradient_beside_an_object_is_that_of_plain_backpropagation(
    tiny_recipe: Path, encoder: Path, references: Path
) -> None:
    task = _task(tiny_recipe, encoder=str(encoder), references=str(references), share=1.0)
    original, tuned = task._embed(_rows(task.diffuser))
    where = plan(task.settings.window, 4, 0, [0, 1, 2, 3])
    start = State(torch.randn(4, *task.diffuser.latent_shape, generator=torch.Generator().manual_seed(0)))
    chain = Chain(task.guided, where, Prompt(tuned.condition.leaf(), tuned.null.leaf()), original)
    final = chain.forward(start)
    weights = torch.randn(final.shape, generator=torch.Generator().manual_seed(1))
    chain.backward(weights)

    leaves = Prompt(tuned.condition.leaf(), tuned.null.leaf())
    state = start
    for index in range(where.start, 4):
        state = task.guided.step(state, leaves, index)
    torch.testing.assert_close(state.latents.detach(), final.detach())
    (state.latents * weights).sum().backward()
    for ours, theirs in zip(chain.tuned, leaves, strict=True):
        assert theirs.embeds.grad.abs().max() > 0 and ours.image.grad is None
        torch.testing.assert_close(ours.embeds.grad, theirs.embeds.grad, rtol=1e-3, atol=1e-5)


def test_conditions_keep_their_parts_in_their_places() -> None:
    text, image = torch.rand(2, 3, 4), torch.rand(2, 1, 5)
    condition = Condition(text, image=image)
    assert condition[:1].pooled is None and torch.equal(condition[:1].image, image[:1])
    other = Condition(torch.rand(2, 3, 4), image=image)
    mixed = mix([condition, other], [0.25, 0.75])
    assert mixed.pooled is None
    torch.testing.assert_close(mixed.image, image)
    torch.testing.assert_close(mixed.embeds, 0.25 * text + 0.75 * other.embeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task.train": {"text_encoder": {}, "unet": {}}}, "shown: the object encoder's UNet draws"),
        ({"task.prefix": {"mode": "stage"}}, 'shown: prefix.mode = "stage" knows of no object'),
        (
            {"task.shown.identity": {"weights": "x", "weight": 0.0}},
            "shown.identity.weight: Input should be greater than 0",
        ),
        (
            {
                "task.shown.identity": {"weights": "x", "weight": 1.0},
                "task.rewards.identity": {"kind": "aesthetic", "weights": "y", "weight": 1.0},
            },
            "a reward of task.rewards has the name 'identity' already",
        ),
    ],
)
def test_what_cannot_be_beside_an_object_is_refused(tiny_recipe: Path, change: dict, message: str) -> None:
    with pytest.raises((RecipeError, ValidationError), match=message):
        load_recipe(tiny_recipe, {"task.shown": {"encoder": "x", "references": "y"}, **change})


def test_what_is_not_there_is_named(tiny_recipe: Path, encoder: Path, references: Path, tmp_path: Path) -> None:
    for shown, message in (
        ({"encoder": str(tmp_path), "references": str(references)}, "task.shown.encoder = .* no run and no bundle"),
        ({"encoder": str(encoder), "references": str(tmp_path)}, "task.shown.references = .* no folder with Parquet"),
        (
            {
                "encoder": str(encoder),
                "references": str(references),
                "identity": {"weights": "./nowhere", "weight": 1.0},
            },
            "task.shown.identity.weights = './nowhere': no such folder",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            preflight.check(load_recipe(tiny_recipe, {"task.shown": shown}), tiny_recipe)
    pyarrow.parquet.write_table(pa.table({"domain": [False], "reference": [[0]]}), references / "0.parquet")
    with pytest.raises(ValueError, match="no row with an object in it"):
        _task(tiny_recipe, encoder=str(encoder), references=str(references))


def test_an_object_encoder_of_another_model_is_refused(tiny_recipe: Path, encoder: Path, references: Path) -> None:
    diffuser = _task(tiny_recipe).diffuser
    other = copy.deepcopy(diffuser.text_encoder)
    _disturb(other, 0.1)
    diffuser.encoders["text_encoder"] = other
    with pytest.raises(ValueError, match="was made for another model than model.path"):
        ShownObjects(ShownObject(encoder=str(encoder), references=str(references)), 0, diffuser)


def test_tuned_encoders_read_a_customizers_prompt_where_they_act(
    tiny_recipe: Path, encoder: Path, tmp_path: Path
) -> None:
    customizer = customize.load(encoder)
    bundle = make_bundle(load_recipe(tiny_recipe), tmp_path, seed=1)
    noise, shown = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 32)

    def made(one: customize.Customizer) -> Tensor:
        return one.generate(PROMPTS[:1], shown, noise, Guidance(4, 3.0, 2.0))

    base, half = made(customizer), made(customize.mixed(customizer, {str(bundle): 0.5}))
    assert torch.equal(made(customize.mixed(customizer, {str(bundle): 0.0})), base)
    assert not torch.allclose(half, base)
    # It acts in the last two of four steps alone, so it cannot change what they begin with.
    tuned = load_encoder(bundle, customizer.diffuser)
    assert tuned.window == (499, 0)
    everywhere = made(replace(customizer, mixture=((replace(tuned, window=(999, 0)), 1.0),)))
    assert not torch.allclose(made(customize.mixed(customizer, {str(bundle): 1.0})), everywhere)
    with pytest.raises(MixtureError, match="allowed: 0 to 1"):
        customize.mixed(customizer, {str(bundle): 1.5})
