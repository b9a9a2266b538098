"""Objects with an identity: their numbers, views, masks and captions, and the scorer that tells them apart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from craftor import object_condition
from craftor_micro.captions import vocabulary
from craftor_micro.identity import IdentityScorer
from craftor_micro.identity_training import draw_identities
from craftor_micro.object_pairs import CHUNK, UNSAID, EncodeObjects, alternating
from craftor_micro.object_render import Rendered, cut_out, render_views
from craftor_micro.object_stages import draw_object, make_plain_cnn
from craftor_micro.objects import (
    HELD_OUT_IDENTITIES,
    NUM_IDENTITIES,
    PATTERNS,
    Views,
    identities,
    near_identical,
    sample_views,
    scene_captions,
)
from craftor_micro.world import BACKGROUNDS, COLOURS

WEIGHTS = "platform/craftor_micro/weights"


def _views(num: int = 64, seed: int = 3, held_out: bool = True) -> Views:
    return sample_views(draw_identities(num, seed, held_out=held_out), seed)


def test_an_identity_is_its_number() -> None:
    every = torch.arange(NUM_IDENTITIES)
    views = sample_views(every, 1)
    assert torch.equal(views.identity(), every)
    colours = views.scenes.colour
    assert (colours[:, 0] != colours[:, 1]).all()
    seen = torch.stack(list(views.attributes().values()), dim=1)
    assert len(seen.unique(dim=0)) == NUM_IDENTITIES >= 3000


def test_training_never_meets_a_held_out_identity() -> None:
    train, test = identities(held_out=False), identities(held_out=True)
    assert len(train) + len(test) == NUM_IDENTITIES and not set(train.tolist()) & set(test.tolist())
    assert len(test) == NUM_IDENTITIES // 8
    assert not HELD_OUT_IDENTITIES[draw_identities(5000, 2, held_out=False)].any()
    assert HELD_OUT_IDENTITIES[draw_identities(500, 2, held_out=True)].all()


def test_two_views_share_the_identity_and_nothing_else() -> None:
    identity = draw_identities(400, 5, held_out=False)
    first, second = sample_views(identity, 6), sample_views(identity, 7)
    assert torch.equal(first.identity(), second.identity())
    assert (first.scenes.center[:, 0] - second.scenes.center[:, 0]).norm(dim=1).mean() > 5
    assert (first.turn - second.turn).abs().mean() > 5
    assert 0.05 < (first.scenes.background == second.scenes.background).float().mean() < 0.25
    again = sample_views(identity, 6)
    assert torch.equal(render_views(again, 1).images, render_views(first, 1).images)


def test_near_identical_objects_differ_in_one_attribute_or_in_the_order_of_colours() -> None:
    views = _views(400)
    others = near_identical(views, 9)
    assert (others.identity() != views.identity()).all()
    assert torch.equal(others.scenes.center, views.scenes.center) and torch.equal(others.turn, views.turn)
    before, after = views.attributes(), others.attributes()
    changed = torch.stack([before[name] != after[name] for name in before]).sum(0)
    swapped = (before["colour"] == after["second_colour"]) & (before["second_colour"] == after["colour"])
    assert ((changed == 1) ^ swapped).all() and swapped.any() and not swapped.all()
    assert (after["colour"] != after["second_colour"]).all()


def test_the_mask_is_where_the_object_is() -> None:
    views = _views()
    seen = render_views(views, 4)
    other_colours = replace(views, scenes=replace(views.scenes, colour=(views.scenes.colour + 3) % len(COLOURS)))
    changed = (render_views(other_colours, 4).images - seen.images).abs().amax(1, keepdim=True)
    assert changed[seen.masks == 0].max() == 0, "a pixel outside the mask depends on the object's colours"
    assert (changed[seen.masks == 1] > 0.02).float().mean() > 0.95
    assert ((seen.masks >= 0) & (seen.masks <= 1)).all() and (seen.masks.flatten(1).sum(1) > 60).all()


def test_a_cut_out_reference_has_no_background() -> None:
    seen = render_views(_views(8), 4)
    fill = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    alone = cut_out(seen, fill)
    outside = (seen.masks == 0).expand_as(alone)
    assert torch.equal(alone[outside], fill[:, :, None, None].expand_as(alone)[outside])
    inside = (seen.masks == 1).expand_as(alone)
    torch.testing.assert_close(alone[inside], seen.images[inside])
    elsewhere = cut_out(Rendered(torch.where(seen.masks == 0, 0.9, seen.images), seen.masks))
    assert torch.equal(elsewhere[outside], cut_out(seen)[outside])


def test_captions_tell_the_scene_and_never_the_identity() -> None:
    views = _views(300)
    said = scene_captions(views, 2)
    words = {word for caption in said for word in caption.split()}
    assert words <= set(vocabulary())
    assert not words & set(COLOURS), "a colour of the object is named"
    names = list(BACKGROUNDS)
    for caption, background in zip(said, views.scenes.background.tolist(), strict=True):
        assert names[background].replace("gray", "gr") in caption.replace("grey", "gr").replace("gray", "gr")


def test_a_scorer_survives_saving_and_agrees_with_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer = IdentityScorer().eval()
    scorer.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2_000_000
    found = IdentityScorer.load(tmp_path)
    views = _views(6)
    images = render_views(views).images
    torch.testing.assert_close(found(images)["pattern"], scorer(images)["pattern"], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found.same(images, images.flip(0)), found.same(images.flip(0), images))
    read = {name: logits.argmax(1) for name, logits in found(images).items()}
    assert found.judge(images, read)["identity"].min() == 1
    wrong = {**read, "pattern": (read["pattern"] + 1) % len(PATTERNS)}
    judged = found.judge(images, wrong)
    assert judged["identity"].max() == 0 and judged["colour"].min() == 1
    with pytest.raises(FileNotFoundError, match="craftor_micro.build identity"):
        IdentityScorer.load(tmp_path / "none")


def test_pairs_hold_another_view_of_the_target_in_a_fixed_pattern() -> None:
    encode = EncodeObjects(f"{WEIGHTS}/base", seed=3, domain_share=0.5, self_pairs=False)
    rows = encode({"id": 2})
    assert [row["index"] for row in rows] == list(range(2 * CHUNK, 3 * CHUNK))
    assert [row["domain"] for row in rows] == [bool(i % 2) for i in range(CHUNK)]
    domain, general = rows[1::2], rows[::2]
    assert all(row["reference"].any() and row["mask"].any() for row in domain)
    assert not any(row["reference"].any() or row["mask"].any() for row in general)
    assert any(word in row["prompt"].split() for row in general for word in COLOURS)
    assert not any(word in row["prompt"].split() for row in domain for word in COLOURS)
    itself = EncodeObjects(f"{WEIGHTS}/base", seed=3, domain_share=0.5, self_pairs=True)({"id": 2})[1::2]
    for pair, self_pair in zip(domain, itself, strict=True):
        assert (pair["latents"] == self_pair["latents"]).all() and (pair["reference"] != self_pair["reference"]).any()


def test_captions_may_be_left_out() -> None:
    said, silent = (
        EncodeObjects(f"{WEIGHTS}/base", seed=3, domain_share=0.5, self_pairs=False, described=described)({"id": 2})
        for described in (True, False)
    )
    for with_words, without in zip(said, silent, strict=True):
        assert (with_words["latents"] == without["latents"]).all()
        assert without["prompt"] == (UNSAID if without["domain"] else with_words["prompt"])


def test_a_plain_classifier_learns_and_is_saved_as_an_image_encoder(tmp_path: Path) -> None:
    make_plain_cnn(tmp_path / "cnn", steps=40, renders=400, seed=3)
    scores = json.loads((tmp_path / "cnn" / "scores.json").read_text())["scores"]
    assert scores["background"] > 1.5 / len(BACKGROUNDS), "better than guessing"
    encoder = object_condition.load(tmp_path / "cnn", "patches")
    clip = object_condition.load("micro:reward_clip", "patches")
    assert (encoder.size, encoder.width) == (clip.size, clip.width) == (64, 96)
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 1, 64, 96)
    weights = [sum(p.numel() for p in one.model.parameters()) for one in (encoder, clip)]
    assert abs(weights[0] / weights[1] - 1) < 0.02


def test_patterns_are_even() -> None:
    assert alternating(8, 0.75).tolist() == [False, True, True, True] * 2
    assert all(window.sum() == 3 for window in alternating(240, 0.25).split(12))


def test_a_picture_to_try_an_encoder_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_object(tmp_path / "star.png", "star", 2)
    assert "star.png: a " in capsys.readouterr().out
    with Image.open(tmp_path / "star.png") as picture:
        assert picture.mode == "RGBA" and picture.size == (64, 64)
        assert picture.getchannel("A").getextrema() == (0, 255)
    with pytest.raises(typer.BadParameter, match="'cube'; allowed: circle, square"):
        draw_object(tmp_path / "cube.png", "cube", 2)
