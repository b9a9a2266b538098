"""ImageReward against its reference procedure, re-stated here in plain torch on weights with their original names."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from craftor_rewards.image_reward import ImageReward, _vision_config
from craftor_rewards.image_reward_names import UNUSED, to_original, to_transformers

WIDTH, DEPTH, PATCH, IMAGE = 128, 2, 8, 32
TEXT_WIDTH, TEXT_MLP, TEXT_HEADS, TEXT_DEPTH = 48, 96, 3, 2
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "a", "red", "blue", "circle", "square", "cat", "on", "the", "grass", ",", ".", "##s"]
MED_CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": TEXT_MLP,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": TEXT_HEADS,
    "num_hidden_layers": TEXT_DEPTH,
    "pad_token_id": 0,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 48,
    "add_cross_attention": True,
}
PROMPTS = ["a red circle", "the cat on the grass, a blue square.", "squares"]


def original_weights() -> dict[str, torch.Tensor]:
    """Random tensors by BLIP's own names, larger than at initialisation so that every part shows in the score; what
    enters the first norm of each side is small, so that its epsilon shows too."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def linear(name, rows, *columns):
        fan_in = math.prod(columns)
        state[f"{name}.weight"] = torch.randn(rows, *columns, generator=generator) * 1.5 / fan_in**0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.2

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    state[f"{vision}.pos_embed"] = torch.randn(1, (IMAGE // PATCH) ** 2 + 1, WIDTH, generator=generator)
    linear(f"{vision}.patch_embed.proj", WIDTH, 3, PATCH, PATCH)
    for i in range(DEPTH):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    norm(f"{vision}.norm", WIDTH)
    state[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]
    for table, rows in (("word", len(WORDS) + 2), ("position", 64)):
        state[f"{text}.embeddings.{table}_embeddings.weight"] = torch.randn(rows, TEXT_WIDTH, generator=generator)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for i in range(TEXT_DEPTH):
        layer = f"{text}.encoder.layer.{i}"
        for attention, source in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{attention}.self.key", TEXT_WIDTH, source)
            linear(f"{layer}.{attention}.self.value", TEXT_WIDTH, source)
            linear(f"{layer}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", TEXT_MLP, TEXT_WIDTH)
        linear(f"{layer}.output.dense", TEXT_WIDTH, TEXT_MLP)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        state[f"{vision}.{name}"] *= 3e-3
    for table in ("word", "position"):
        state[f"{text}.embeddings.{table}_embeddings.weight"] *= 3e-3
    linear("blip.vision_proj", 256, WIDTH)
    linear("blip.text_proj", 256, TEXT_WIDTH)
    widths = (TEXT_WIDTH, 1024, 128, 64, 16, 1)
    for index, rows, columns in zip((0, 2, 4, 6, 7), widths[1:], widths[:-1], strict=True):
        linear(f"mlp.layers.{index}", rows, columns)
    return state


def attend(queries, keys, values, heads, mask=None):
    """Scaled dot-product attention (Vaswani et al. 2017); `mask` is 1 for keys that count."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def reference_scores(state, pixels, ids, mask):
    """ImageReward as its paper and BLIP's describe it: a pre-norm ViT, a post-norm BERT that attends to it, a head."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    vision = "blip.visual_encoder"
    patches = F.conv2d(
        pixels, state[f"{vision}.patch_embed.proj.weight"], state[f"{vision}.patch_embed.proj.bias"], stride=PATCH
    )
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{vision}.cls_token"].expand(len(x), -1, -1), x], dim=1) + state[f"{vision}.pos_embed"]
    for i in range(DEPTH):
        block = f"{vision}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, WIDTH // 64))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    image = norm(f"{vision}.norm", x, 1e-6)

    text = "blip.text_encoder"
    table = f"{text}.embeddings.{{}}_embeddings.weight"
    h = state[table.format("word")][ids] + state[table.format("position")][: ids.shape[1]]
    h = norm(f"{text}.embeddings.LayerNorm", h, 1e-12)
    for i in range(TEXT_DEPTH):
        layer = f"{text}.encoder.layer.{i}"
        for name, source, source_mask in ((f"{layer}.attention", None, mask), (f"{layer}.crossattention", image, None)):
            source = h if source is None else source
            q = linear(f"{name}.self.query", h)
            k, v = (linear(f"{name}.self.{part}", source) for part in ("key", "value"))
            read = linear(f"{name}.output.dense", attend(q, k, v, TEXT_HEADS, source_mask))
            h = norm(f"{name}.output.LayerNorm", read + h, 1e-12)
        wide = F.gelu(linear(f"{layer}.intermediate.dense", h))
        h = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", wide) + h, 1e-12)
    score = h[:, 0]
    for index in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{index}", score)
    return (score.squeeze(1) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The layout of the public repository, with the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(original_weights(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward(folder)


@pytest.fixture
def images():
    """Of the size that the tower takes, so that no resize stands between the two procedures."""
    return torch.rand(3, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


def reference(images, prompts):
    """From images of the right size and prompts on."""
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return reference_scores(original_weights(), (images - mean) / std, tokens.input_ids, tokens.attention_mask)


def test_scores_are_those_of_the_reference_procedure(reward, images):
    expected = reference(images, PROMPTS)
    assert expected.std() > 0.1, "a reference that says the same of everything would test nothing"
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=2e-5, atol=2e-5)
    ids = reward.tokenizer(PROMPTS).input_ids
    assert ids[0] == [WORDS.index(word) for word in ("[CLS]", "a", "red", "circle", "[SEP]")]
    assert ids[2] == [WORDS.index(word) for word in ("[CLS]", "square", "##s", "[SEP]")]


def test_gradients_are_those_of_the_reference_procedure(reward, images):
    ours, theirs = (images.clone().requires_grad_(True) for _ in range(2))
    reward(ours, PROMPTS).sum().backward()
    reference(theirs, PROMPTS).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())
    assert (ours.grad.abs().amax(1) > 0).all(), "every pixel"


def test_images_are_resized_on_the_shorter_side_and_cropped_as_by_pil(reward):
    pixels = (smooth(3, 75, 64) * 255).round().to(torch.uint8)
    square = []
    for image in pixels:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((IMAGE, IMAGE * 75 // 64), Image.Resampling.BICUBIC)
        top = round((picture.height - IMAGE) / 2)
        picture = picture.crop((0, top, IMAGE, top + IMAGE))
        square.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    expected = reference(torch.stack(square), PROMPTS)
    scores = reward(pixels / 255, PROMPTS)
    assert (scores - expected).abs().max() < 0.05 * expected.std()


def smooth(num, height, width):
    """Blobs with edges, as photographs have."""
    noise = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    return F.interpolate(noise, size=(height, width), mode="bilinear").sub(0.5).mul(3).add(0.5).clamp(0, 1)


def test_names_are_converted_forth_and_back(reward):
    state = original_weights()
    ours = to_transformers(state, reward.state_dict())
    assert ours.keys() == reward.state_dict().keys()
    back = to_original(ours)
    assert back.keys() == state.keys() - set(UNUSED)
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_the_public_model_s_names_and_shapes_are_complete():
    """Of the real sizes, on the meta device: ViT-L/16 at 224 pixels and BERT-base with cross-attention."""
    with torch.device("meta"):
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
            )
        )
        text = BlipTextModel(BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024), add_pooling_layer=False)
    state = {f"vision.{name}": tensor for name, tensor in vision.state_dict().items()}
    state |= {f"text.{name}": tensor for name, tensor in text.state_dict().items()}
    names = to_original(state)
    assert len(names) == len(state) == 4 + 24 * 12 + 2 + 4 + 12 * 26
    assert all(name.startswith(("blip.visual_encoder.", "blip.text_encoder.")) for name in names)
    assert "blip.visual_encoder.blocks.23.attn.qkv.weight" in names
    assert names["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)
    config = _vision_config(names)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (224, 16, 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("blip.visual_encoder.blocks.1.attn.proj.bias"),
            "1 tensors .* missing.*blocks.1.attn.pr",
        ),
        (lambda state: state.pop("mlp.layers.7.weight"), "1 tensors .* missing.*'mlp.layers.7.weight'"),
        (lambda state: state.update({"blip.itm_head.weight": torch.ones(1)}), "do not belong.*blip.itm_head.weight"),
        (lambda state: state.update({"vision.post_layernorm.bias": torch.ones(1)}), "do not belong.*vision.post_layer"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused(reward, change, message):
    state = original_weights()
    change(state)
    with pytest.raises(ValueError, match=message):
        to_transformers(state, reward.state_dict())


def test_a_score_depends_on_its_own_image_and_prompt_alone(reward, images):
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(reward(images[:1], PROMPTS[:1])[0], scores[0], rtol=1e-5, atol=1e-5)
    others = reward(torch.cat([images[:1], images[1:].flip(3)]), [PROMPTS[0], "a cat", "the grass"])
    torch.testing.assert_close(others[0], scores[0], rtol=1e-5, atol=1e-5)
    assert (others[1:] - scores[1:]).abs().min() > 1e-3
    assert (reward(images, PROMPTS[::-1])[1] - scores[1]).abs() < 1e-5


def test_it_is_frozen_and_without_dropout(reward, images):
    images.requires_grad_(True)
    reward(images, PROMPTS).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())
    scores = reward.train()(images, PROMPTS)
    assert not any(module.training for module in reward.modules())
    assert torch.equal(scores, reward(images, PROMPTS))


def test_checkpointing_changes_nothing_but_what_is_kept(folder, reward, images):
    kept = {False: 0, True: 0}
    gradients = {}
    for checkpoint in kept:
        model = ImageReward(folder, checkpoint=True) if checkpoint else reward
        leaf = images.clone().requires_grad_(True)

        def count(tensor, checkpoint=checkpoint):
            kept[checkpoint] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            score = model.train()(leaf, PROMPTS).sum()
        score.backward()
        gradients[checkpoint] = leaf.grad
    torch.testing.assert_close(gradients[True], gradients[False])
    assert kept[True] < 0.7 * kept[False]


def test_the_image_tower_can_run_in_bfloat16(folder, reward, images):
    half = ImageReward(folder, dtype=torch.bfloat16)
    images.requires_grad_(True)
    scores = half(images, PROMPTS)
    scores.sum().backward()
    assert scores.dtype == torch.float32 and images.grad.isfinite().all()
    assert (scores - reward(images, PROMPTS)).abs().max() < 0.2 * reward(images, PROMPTS).std()


def test_a_ceiling_is_refl_s_hinge(folder, reward, images):
    scores = reward(images, PROMPTS)
    ceiling = scores.sort().values[1:].mean().item()
    images.requires_grad_(True)
    hinged = ImageReward(folder, ceiling=ceiling)(images, PROMPTS)
    torch.testing.assert_close(hinged, (scores - ceiling).clamp(max=0))
    hinged.sum().backward()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).tolist() == (scores < ceiling).tolist()
    with pytest.raises(ValueError, match="ceiling is nan; expected a finite"):
        ImageReward(folder, ceiling=math.nan)


def test_prompts_are_read_up_to_35_tokens_and_say_so(reward, images):
    long = " ".join(["red"] * 33)
    assert reward.truncated([long, f"{long} circle", "a"]) == [False, True, False]
    pair = reward(images[:1].repeat(2, 1, 1, 1), [long, f"{long} circle"])
    torch.testing.assert_close(pair[0], pair[1])
    with pytest.raises(ValueError, match="prompt 1 is ' '"):
        reward(images[:2], ["a", " "])


def test_missing_files_and_misfits_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks an ImageReward: expected ImageReward.pt and med_config.json"):
        ImageReward(tmp_path)
    for name in ("ImageReward.pt", "med_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(ValueError, match=f"has {len(WORDS) + 1} tokens; its med_config.json has {len(WORDS) + 2}"):
        ImageReward(tmp_path)
    torch.save({"weight": torch.ones(1)}, tmp_path / "ImageReward.pt")
    shutil.copy(folder / "vocab.txt", tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="no tensor 'blip.visual_encoder.pos_embed': these are not the weights"):
        ImageReward(tmp_path)
    (tmp_path / "med_config.json").write_text(json.dumps({k: v for k, v in MED_CONFIG.items() if k != "hidden_act"}))
    with pytest.raises(ValueError, match="med_config.json' lacks hidden_act"):
        ImageReward(tmp_path)
    shutil.copy(folder / "med_config.json", tmp_path / "med_config.json")
    torch.save({"state": [torch.ones(1), "text"], "code": print}, tmp_path / "ImageReward.pt")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
        ImageReward(tmp_path)


def test_the_checkpoint_file_itself_names_its_folder(folder, reward, images):
    torch.testing.assert_close(ImageReward(folder / "ImageReward.pt")(images, PROMPTS), reward(images, PROMPTS))
