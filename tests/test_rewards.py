"""Rewards on tiny random weights: scores per pair, gradient to pixels, nothing trained, errors that help."""

import pytest
import torch
from transformers import CLIPModel

from craftor_micro.contrastive import build_clip
from craftor_micro.tokenizer import build_tokenizer
from craftor_rewards import REWARDS, Reward, build, declaration
from craftor_rewards import clip as clip_module
from craftor_rewards.aesthetic import Head
from craftor_rewards.preprocess import CLIP_MEAN, CLIP_STD
from craftor_rewards.protocol import check_inputs, check_range, check_scores

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


# The kinds made of CLIPs; others have tests of their own.
REWARD_FOLDERS = {"clip_score": _save_clip, "aesthetic": _save_aesthetic, "pick_score": _save_clip, "hps": _save_clip}


@pytest.fixture(params=sorted(REWARD_FOLDERS))
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
    check_scores(scores, 3, "it")
    said = declaration(reward)
    assert said.differentiable and said.input_size == 64 and said.fit in ("crop", "crop_torchvision", "letterbox")
    if not isinstance(said.score_range, str):
        assert said.score_range[0] <= scores.min() and scores.max() <= said.score_range[1]


def test_every_kind_says_what_it_is_before_it_is_built():
    for kind in REWARD_FOLDERS:
        for key in ("differentiable", "needs_prompt", "fit", "score_range"):
            assert getattr(REWARDS[kind], key) is not None, (kind, key)


def test_gradient_reaches_every_image_and_no_weight(reward, images):
    images.requires_grad_(True)
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert (images.grad != 0).all(), "every pixel of a square image counts"
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


def test_images_of_another_size_are_resized_and_made_square(reward, images):
    wide = torch.nn.functional.interpolate(images, size=(96, 160), mode="bilinear").requires_grad_(True)
    reward(wide, PROMPTS).sum().backward()
    outside = wide.grad[:, :, :, [0, 1, -2, -1]]
    if reward.fit == "letterbox":
        assert (wide.grad != 0).all(), "a letterbox shows the whole image"
    else:
        assert wide.grad.abs().sum() > 0 and outside.abs().sum() == 0, "what the centre crop cuts off has no gradient"


def test_preprocessing_leaves_the_right_size_alone(tmp_path, images):
    towers = clip_module.ClipTowers(_save_clip(tmp_path))
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
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
    with pytest.raises(ValueError, match="unknown reward 'beauty'; available: clip_score, aesthetic, pick_score, hps"):
        build("beauty", tmp_path)
    for kind in REWARD_FOLDERS:
        with pytest.raises(FileNotFoundError, match="nowhere.*hf download"):
            build(kind, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        build("clip_score", tmp_path / "empty")


def test_a_precision_goes_by_its_name_in_recipes(tmp_path, images):
    torch.manual_seed(0)
    clip = _save_clip(tmp_path)
    full, reduced = (build("clip_score", clip, dtype=name)(images, PROMPTS) for name in ("fp32", "bf16"))
    assert torch.equal(full, build("clip_score", clip)(images, PROMPTS))
    assert torch.allclose(full, reduced, atol=0.02) and not torch.equal(full, reduced)
    with pytest.raises(ValueError, match="reward 'clip_score': option dtype = 'int8'; allowed: fp32, bf16, fp16"):
        build("clip_score", clip, dtype="int8")


def test_a_head_must_fit_its_clip(tmp_path):
    _save_clip(tmp_path / "clip")
    Head([32, 1], "identity").save(tmp_path, clip="clip")
    with pytest.raises(ValueError, match="takes 32 features; its CLIP '.*clip' gives 16"):
        build("aesthetic", tmp_path)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 4, 8, 8), ["a", "b"], r"shape \(2, 4, 8, 8\); expected \(batch, 3"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], "torch.uint8; expected floating point"),
        (torch.rand(2, 3, 8, 8), ["a"], "2 images but 1 prompts"),
        (torch.rand(2, 3, 8, 8), "ab", "the string 'ab'"),
        (torch.rand(2, 3, 8, 8), ["a", ""], "prompt 1 is ''; expected text"),
        (torch.rand(2, 3, 8, 8), [" \n", "b"], r"prompt 0 is ' \\n'; expected text"),
        (torch.rand(2, 3, 8, 8), [None, "b"], "prompt 0 is None; expected text"),
        (torch.rand(3, 8, 8), ["a", "b", "c"], r"shape \(3, 8, 8\); expected \(batch, 3"),
    ],
)
def test_inputs_are_checked(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(images, prompts)


def test_prompts_do_not_matter_to_a_reward_that_ignores_them(reward, images):
    if reward.needs_prompt:
        with pytest.raises(ValueError, match="prompt 2 is ''"):
            reward(images, ["a", "b", ""])
    else:
        assert torch.equal(reward(images, ["", "", ""]), reward(images, PROMPTS))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.linspace(-1, 1, 48).view(1, 3, 4, 4),
            r"range from -1 to 1; expected \[0, 1\]; these look like \[-1, 1\]",
        ),
        (torch.full((1, 3, 4, 4), 254.0), "range from 254 to 254; .*these look like 0 to 255: divide"),
        (torch.full((1, 3, 4, 4), 1.2), r"range from 1.2 to 1.2; expected \[0, 1\]$"),
        (torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), float("nan"))]), r"images \[1\] .* NaN or infinite"),
        (torch.full((1, 3, 4, 4), float("inf")), r"images \[0\] .* NaN or infinite"),
    ],
)
def test_pixels_are_checked_when_asked(images, message):
    with pytest.raises(ValueError, match=message):
        check_range(images)
    check_range(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor(1.0), r"'mine' returned torch.float32 of shape \(\); expected floating point of shape \(2,\)"),
        (torch.zeros(2, 2), r"of shape \(2, 2\)"),
        (torch.zeros(2, dtype=torch.long), "torch.int64"),
        ([1.0, 2.0], r"returned \[1.0, 2.0\]"),
        (torch.tensor([1.0, float("nan")]), r"NaN or infinity for images \[1\]"),
    ],
)
def test_scores_are_checked_when_asked(scores, message):
    with pytest.raises(ValueError, match=message):
        check_scores(scores, 2, "mine")
