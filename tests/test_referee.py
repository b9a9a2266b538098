"""The exact scorer on its shipped weights: it reads clean held-out renders, and judges what is said of them."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from craftor_micro.captions import Description, ObjectClaim, describe
from craftor_micro.hard_negatives import REPLACED, replace_attribute
from craftor_micro.pool import render_pool
from craftor_micro.referee import ATTRIBUTES, Referee, canonical, compare

WEIGHTS = Path(__file__).parents[1] / "platform/craftor_micro/weights/referee"
RED, BLUE = ObjectClaim("circle", "red", "small"), ObjectClaim("star", "blue", "large")


@pytest.fixture(scope="module")
def referee():
    return Referee.load(WEIGHTS)


@pytest.fixture(scope="module")
def pool():
    return render_pool(500, seed=424_242, held_out=True, two_objects=0.4)


@pytest.fixture(scope="module")
def images(pool):
    return pool.batch(torch.arange(len(pool)))


def _pair(first: ObjectClaim, relation: str | None, second: ObjectClaim) -> Description:
    return Description((first, second), relation, "white", "plain")


def test_it_reads_clean_held_out_renders_wholly_right(referee, pool, images):
    scores = referee.judge(images, describe(pool.scenes))
    assert scores["accuracy"].mean() >= 0.97
    assert (scores["quality"] - pool.scenes.rating()).abs().mean() <= 0.6
    assert set(scores) == {*ATTRIBUTES, "accuracy", "quality"}
    assert all(column.shape == (len(pool),) for column in scores.values())


@pytest.mark.parametrize("attribute", REPLACED)
def test_a_wrong_claim_is_wrong_in_that_attribute(referee, pool, images, attribute):
    rng = random.Random(3)
    wrong = [replace_attribute(description, attribute, rng) for description in describe(pool.scenes)]
    scores = referee.judge(images, wrong)
    assert scores["accuracy"].mean() <= 0.03
    assert scores["count"].mean() >= 0.97
    other = "background" if attribute != "background" else "texture"
    assert scores[attribute].mean() <= 0.05 and scores[other].mean() >= 0.97


def test_noise_of_a_diffusion_model_s_size_does_not_blind_it(referee, pool, images):
    noisy = (images + 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert referee.judge(noisy, describe(pool.scenes))["accuracy"].mean() >= 0.95


def test_what_is_not_mentioned_is_not_judged(referee, pool, images):
    vague = [
        replace(d, objects=tuple(ObjectClaim(o.shape, None, None) for o in d.objects), background=None, texture=None)
        for d in describe(pool.scenes)
    ]
    scores = referee.judge(images, vague)
    assert all(scores[name].isnan().all() for name in ("colour", "size", "background", "texture"))
    assert scores["accuracy"].mean() >= 0.97


def test_both_wordings_of_a_relation_are_one_claim():
    below, above = _pair(RED, "below", BLUE), _pair(BLUE, "above", RED)
    assert canonical(below) == canonical(above) == above
    for said in (below, above):
        assert all(compare(above, said)[name] == 1 for name in ATTRIBUTES)


def test_a_turned_relation_is_wrong_in_position_alone():
    seen = _pair(BLUE, "above", RED)
    for said in (_pair(RED, "above", BLUE), _pair(BLUE, "left of", RED)):
        verdict = compare(seen, said)
        assert verdict["position"] == 0
        assert all(verdict[name] == 1 for name in ATTRIBUTES if name != "position")


def test_colours_bound_to_the_wrong_shapes_are_wrong():
    seen = _pair(BLUE, "above", RED)
    verdict = compare(seen, _pair(replace(BLUE, colour="red"), "above", replace(RED, colour="blue")))
    assert verdict["count"] == 1 and verdict["colour"] == 0 and verdict["shape"] == 1


def test_a_missing_object_is_wrong_and_a_surplus_one_is_a_wrong_count():
    one, two = Description((RED,), "center", "white", "plain"), _pair(BLUE, "above", RED)
    missing = compare(one, two)
    assert missing["count"] == missing["shape"] == missing["colour"] == missing["position"] == 0
    surplus = compare(two, one)
    assert surplus["count"] == surplus["position"] == 0 and surplus["shape"] == surplus["colour"] == 1
    assert math.isnan(compare(two, replace(one, layout=None))["position"])


def test_it_is_frozen_and_its_errors_name_the_folder(referee, images, tmp_path):
    assert not any(p.requires_grad for p in referee.parameters()) and not referee.training
    with pytest.raises(FileNotFoundError, match=f"no referee in '{tmp_path}'"):
        Referee.load(tmp_path)
    with pytest.raises(ValueError, match="500 images but 1 descriptions"):
        referee.judge(images, [_pair(RED, "above", BLUE)])
