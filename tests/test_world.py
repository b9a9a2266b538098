"""The procedural world: seeded, held out for good, on the canvas, and described in words of one token each."""

import json
import random
from dataclasses import fields

import pytest
import torch

from craftor_micro.captions import Description, corrupt, describe, vocabulary, write
from craftor_micro.pool import captions, render_pool
from craftor_micro.render import render
from craftor_micro.tokenizer import MAX_LENGTH, build_tokenizer
from craftor_micro.world import HELD_OUT, Scenes, sample_scenes, with_quality


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def _same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scenes))


def test_a_seed_is_a_world():
    first, again, other = render_pool(64, seed=5), render_pool(64, seed=5), render_pool(64, seed=6)
    assert _same(first.scenes, again.scenes) and torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert captions(first.scenes, 1, clean=False) == captions(first.scenes, 1, clean=False)


def test_held_out_scenes_are_never_trained_on():
    train, held_out = sample_scenes(4000, seed=1), sample_scenes(1000, seed=1, held_out=True)
    assert not train.held_out().any() and held_out.held_out().all()
    assert HELD_OUT.sum() == HELD_OUT.numel() // 8
    triples = HELD_OUT[train.colour[:, 0], train.shape[:, 0], train.background]
    assert not triples.any()
    for dims in ((1, 2), (0, 2), (0, 1)):
        assert not HELD_OUT.all(dim=dims[1]).all(dim=dims[0]).any(), "every colour, shape and background is seen"


def test_images_are_in_range_and_objects_on_the_canvas():
    scenes = sample_scenes(600, seed=2, two_objects=0.5)
    images = render(scenes, seed=3)
    assert images.shape == (600, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    reach = scenes.radius[:, :, None]
    used = torch.arange(2) < scenes.count[:, None]
    assert ((scenes.center - reach >= 0) & (scenes.center + reach <= 64)).all(-1)[used].all()
    two = scenes.count == 2
    assert (scenes.colour[two, 0] != scenes.colour[two, 1]).all()


def test_quality_changes_pixels_but_no_caption():
    scenes = sample_scenes(32, seed=4)
    best, worst = (with_quality(scenes, torch.full((32, 3), q)) for q in (1.0, 0.0))
    assert torch.allclose(best.rating(), torch.full((32,), 10.0)) and (worst.rating() == 0).all()
    contrast = [render(s, seed=1).flatten(1).std(1).mean() for s in (best, worst)]
    assert contrast[0] > 1.3 * contrast[1]
    assert describe(best) == describe(worst)


def test_captions_fit_and_every_word_is_one_token(tokenizer):
    scenes = sample_scenes(2000, seed=7, two_objects=0.5)
    ids = tokenizer(captions(scenes, 8, clean=True) + captions(scenes, 9, clean=False)).input_ids
    assert max(map(len, ids)) <= 22 < MAX_LENGTH
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is one token between start and end"


def test_captions_use_known_words_alone():
    known = set(vocabulary())
    said = {word for caption in captions(sample_scenes(2000, seed=10), 11, clean=False) for word in caption.split()}
    assert said <= known


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    text = "an image of a big grey star above a little pink ring"
    assert loaded(text).input_ids == tokenizer(text).input_ids and loaded.model_max_length == MAX_LENGTH


def test_descriptions_round_trip_through_json():
    rng = random.Random(0)
    for description in describe(sample_scenes(200, seed=12, two_objects=0.5)):
        for version in (description, corrupt(description, rng, forget=1.0, wrong=1.0)):
            assert Description.from_json(json.loads(json.dumps(version.to_json()))) == version


def test_clean_captions_say_everything_and_careless_ones_do_not():
    described = describe(sample_scenes(500, seed=13, two_objects=0.0))
    rng = random.Random(1)
    for description in described:
        caption = write(description, rng)
        for word in (description.objects[0].shape, description.objects[0].colour, description.texture):
            assert word in caption
    careless = [corrupt(description, rng) for description in described]
    changed = sum(a != b for a, b in zip(described, careless, strict=True)) / len(described)
    assert 0.25 < changed < 0.55
