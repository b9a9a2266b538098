"""DINO and DINOv2 features, and what is measured with them: diversity inside a prompt, identity between images."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from craftor_rewards.features import ClipFeatures, DinoFeatures, build_features, identity, pairwise_diversity

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_dino(folder):
    """DINO's repositories hold a `ViTModel` for 224 pixels, without a pooler."""
    torch.manual_seed(0)
    config = ViTConfig(**TINY, intermediate_size=64, image_size=224, patch_size=32, initializer_range=0.3)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)


def save_dinov2(folder):
    """DINOv2's are for another size than they are used at: positions are interpolated."""
    torch.manual_seed(0)
    config = Dinov2Config(**TINY, mlp_ratio=2, image_size=140, patch_size=28, initializer_range=0.3)
    Dinov2Model(config).save_pretrained(folder)


@pytest.fixture(scope="module", params=[save_dino, save_dinov2], ids=["dino", "dinov2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return folder


@pytest.fixture(scope="module")
def dino(folder):
    return DinoFeatures(folder)


def test_features_are_built_by_what_the_weights_are(folder, images, tiny):
    assert torch.equal(build_features(folder)(images), DinoFeatures(folder)(images))
    assert isinstance(build_features(tiny / "clip"), ClipFeatures)


@pytest.fixture
def images():
    return torch.rand(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def test_features_are_the_class_token_of_the_stock_model(folder, dino, images):
    """As both were evaluated: 256 pixels, the middle 224, ImageNet's statistics."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = (images[:, :, 16:240, 16:240] - mean) / std
    stock = {"vit": ViTModel, "dinov2": Dinov2Model}[dino.model.config.model_type].from_pretrained(folder)
    token = stock(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(dino(images), token / token.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_features_are_unit_vectors_with_gradient_to_every_pixel_seen(dino, images):
    images.requires_grad_(True)
    features = dino(images)
    assert features.shape == (3, dino.width)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    features[:, 0].sum().backward()
    seen = images.grad.abs().amax(1) > 0
    assert seen[:, 16:240, 16:240].all() and seen.sum() == 3 * 224 * 224
    assert all(not p.requires_grad and p.grad is None for p in dino.parameters())
    assert not any(module.training for module in dino.modules())


def test_features_depend_on_their_own_image_alone_and_on_little_of_its_size(dino, images):
    features = dino(images)
    torch.testing.assert_close(dino(images[1:2])[0], features[1], rtol=1e-4, atol=1e-5)
    smooth = F.interpolate(images[:, :, ::32, ::32], size=(256, 256), mode="bicubic").clamp(0, 1)
    large = F.interpolate(smooth, size=(512, 512), mode="bicubic").clamp(0, 1)
    assert identity(dino(smooth), dino(large)).min() > 0.99
    assert identity(dino(smooth), dino(smooth.flip(0))).min() < 0.99
    assert identity(dino(F.pad(large, (64, 64))), dino(large)).min() > 0.999, "what is beyond the crop is not seen"


def test_bfloat16_features_are_close(folder, dino, images):
    features = DinoFeatures(folder, dtype=torch.bfloat16)(images)
    assert features.dtype == torch.float32
    assert identity(features, dino(images)).min() > 0.99


def test_diversity_is_one_minus_the_mean_cosine_of_all_pairs():
    features = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = ["b", "a", "a", "b", "a", "c", "c"]
    by_hand = []
    for group in ("b", "a", "c"):
        rows = [i for i in range(7) if groups[i] == group]
        cosines = [features[i] @ features[j] for i in rows for j in rows if i < j]
        by_hand.append(1 - sum(cosines) / len(cosines))
    torch.testing.assert_close(pairwise_diversity(features, groups), torch.stack(by_hand))
    torch.testing.assert_close(pairwise_diversity(3 * features, groups), torch.stack(by_hand))
    same, opposite = features[:1].repeat(2, 1), torch.cat([features[:1], -features[:1]])
    torch.testing.assert_close(
        pairwise_diversity(torch.cat([same, opposite, torch.eye(5)]), [0] * 2 + [1] * 2 + [2] * 5),
        torch.tensor([0.0, 2.0, 1.0]),
    )


def test_diversity_pushes_the_images_of_a_prompt_apart():
    features = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.2, 0.0], [0.0, 0.0, 1.0], [0.0, 0.1, 1.0]]), dim=1)
    features.requires_grad_(True)
    pairwise_diversity(features, [0, 0, 1, 1]).sum().backward()
    moved = features.detach() + 0.1 * features.grad
    before, after = (pairwise_diversity(x.detach(), [0, 0, 1, 1]) for x in (features, moved))
    assert (after > before).all()


def test_identity_is_the_cosine_of_matched_pairs():
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(identity(a, b), torch.tensor([1.0, 0.0, -1.0]))


def test_bad_inputs_are_named(tmp_path, dino):
    with pytest.raises(ValueError, match="2 features but 3 groups"):
        pairwise_diversity(torch.ones(2, 4), ["a", "a", "b"])
    with pytest.raises(ValueError, match="group 'b' has one image; expected at least two"):
        pairwise_diversity(torch.ones(3, 4), ["a", "a", "b"])
    with pytest.raises(ValueError, match=r"shape \(2, 4\), references \(3, 4\)"):
        identity(torch.ones(2, 4), torch.ones(3, 4))
    for images, message in (
        (torch.rand(2, 1, 8, 8), r"shape \(2, 1, 8, 8\); expected \(batch, 3"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8; expected floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            dino(images)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DinoFeatures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="lacks a DINO: expected config.json"):
        DinoFeatures(tmp_path)
    clip = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    CLIPVisionModel(clip).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'clip_vision_model' model; available: vit, dinov2"):
        DinoFeatures(tmp_path)


def test_half_a_checkpoint_is_refused(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.startswith("layernorm"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks 1 tensors of a '.*', first '{lost}'"):
        DinoFeatures(tmp_path)
