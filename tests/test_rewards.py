"""Rewards on tiny random weights: scores per pair, gradient to pixels, nothing trained, errors that help."""

import pytest
import torch
from transformers import CLIPModel

from craftor_micro.contrastive import build_clip
from craftor_micro.tokenizer import build_tokenizer
from craftor_rewards import REWARDS, Reward, build
from craftor_rewards import clip as clip_module
from craftor_rewards.aesthetic import Head
from craftor_rewards.protocol import check_inputs

PROMPTS = ["a red circle", "a small blue star on a plain white background", "there is a big ring"]


def _save_clip(folder):
    tokenizer = build_tokenizer()
    build_clip(tokenizer, width=16, num_layers=1).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _save_aesthetic(folder):
    _save_clip(folder / "clip")
    Head([16, 8, 1], "gelu").save(folder, clip="clip")
    return folder


REWARD_FOLDERS = {"clip_score": _save_clip, "aesthetic": _save_aesthetic, "pick_score": _save_clip}


@pytest.fixture(params=sorted(REWARDS))
def reward(request, tmp_path) -> Reward:
    torch.manual_seed(0)
    return build(request.param, REWARD_FOLDERS[request.param](tmp_path))


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_every_reward_keeps_the_protocol(reward, images):
    assert isinstance(reward, Reward)
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()


def test_gradient_reaches_every_image_and_no_weight(reward, images):
    images.requires_grad_(True)
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    for name, parameter in reward.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name
    assert not any(module.training for module in reward.modules())


def test_a_score_depends_on_its_own_image_and_prompt_alone(reward, images):
    scores = reward(images, PROMPTS)
    others = torch.cat([images[:1], images[1:].flip(3)])
    mixed = reward(others, [PROMPTS[0], "a cross", "a triangle"])
    torch.testing.assert_close(mixed[0], scores[0])
    torch.testing.assert_close(reward(images[:1], PROMPTS[:1])[0], scores[0])
    assert (mixed[1:] != scores[1:]).all()
    changed = reward(images, [PROMPTS[0], "a cross", PROMPTS[2]]) != scores
    assert changed.tolist() == [False, reward.needs_prompt, False]


def test_images_of_another_size_are_resized_and_cropped(reward, images):
    wide = torch.nn.functional.interpolate(images, size=(96, 160), mode="bilinear").requires_grad_(True)
    reward(wide, PROMPTS).sum().backward()
    outside = wide.grad[:, :, :, [0, 1, -2, -1]]
    assert wide.grad.abs().sum() > 0 and outside.abs().sum() == 0, "what the centre crop cuts off has no gradient"


def test_preprocessing_leaves_the_right_size_alone(tmp_path, images):
    towers = clip_module.ClipTowers(_save_clip(tmp_path))
    mean, std = (torch.tensor(v)[:, None, None] for v in (clip_module.CLIP_MEAN, clip_module.CLIP_STD))
    torch.testing.assert_close(towers.preprocess(images) * std + mean, images)


def test_cached_prompts_give_equal_features(tmp_path, monkeypatch):
    towers = clip_module.ClipTowers(_save_clip(tmp_path))
    first = towers.text_features(PROMPTS)
    assert torch.equal(towers.text_features(PROMPTS[::-1] + PROMPTS), torch.cat([first.flip(0), first]))
    assert not first.requires_grad
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    monkeypatch.setattr(clip_module, "NUM_CACHED_PROMPTS", 2)
    torch.testing.assert_close(towers.text_features(PROMPTS), first)
    assert len(towers._cache) == 2, "the cache is bounded"
    torch.testing.assert_close(towers.text_features(PROMPTS[:1]), first[:1])


def test_scores_are_the_published_formulas(tmp_path, images):
    clip_score, pick_score = (build(kind, _save_clip(tmp_path / kind)) for kind in ("clip_score", "pick_score"))
    pick_score.load_state_dict(clip_score.state_dict())
    cosines = clip_score(images, PROMPTS)
    assert (cosines.abs() <= 1).all()
    torch.testing.assert_close(pick_score(images, PROMPTS), cosines * clip_score.towers.clip.logit_scale.exp())
    clip = CLIPModel.from_pretrained(tmp_path / "clip_score", dtype=torch.float32)
    ids = clip_score.towers.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    logits = clip(input_ids=ids, pixel_values=clip_score.towers.preprocess(images)).logits_per_image
    torch.testing.assert_close(logits.diagonal() / clip.logit_scale.exp(), cosines, rtol=1e-4, atol=1e-5)


def test_an_aesthetic_head_can_share_another_reward_s_clip(tmp_path, images):
    _save_clip(tmp_path / "shared")
    Head([16, 1], "identity").save(tmp_path / "head", clip="../shared")
    reward = build("aesthetic", tmp_path / "head")
    features = reward.towers.image_features(images)
    torch.testing.assert_close(reward(images, PROMPTS), reward.head.layers[0](features).squeeze(1))


def test_unknown_rewards_and_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="unknown reward 'beauty'; available: clip_score, aesthetic, pick_score"):
        build("beauty", tmp_path)
    for kind in REWARDS:
        with pytest.raises(FileNotFoundError, match="nowhere.*hf download"):
            build(kind, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        build("clip_score", tmp_path / "empty")


def test_a_head_must_fit_its_clip(tmp_path):
    _save_clip(tmp_path / "clip")
    Head([32, 1], "identity").save(tmp_path, clip="clip")
    with pytest.raises(ValueError, match="takes 32 features; its CLIP 'clip' gives 16"):
        build("aesthetic", tmp_path)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 4, 8, 8), ["a", "b"], r"shape \(2, 4, 8, 8\); expected \(batch, 3"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], "torch.uint8; expected floating point"),
        (torch.rand(2, 3, 8, 8), ["a"], "2 images but 1 prompts"),
        (torch.rand(2, 3, 8, 8), "ab", "the string 'ab'"),
    ],
)
def test_inputs_are_checked(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(images, prompts)
