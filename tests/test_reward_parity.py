"""Each reward against its reference procedure, restated here from its card or paper, on the same random weights.

Tolerance is 1e-4 on 8-bit images of the tower's own size, where no resize rounds. On larger ones the reference rounds
to 8 bits after each axis and we do not: that moves pixels by up to 1/255, and a cosine of these towers by up to 2e-3.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from craftor_micro.tokenizer import build_tokenizer
from craftor_rewards import Aesthetic, build, open_clip_names
from craftor_rewards.aesthetic import Head, collapse
from craftor_rewards.clip import ClipTowers
from craftor_rewards.loading import load_tensors
from craftor_rewards.open_clip_names import infer_config, to_open_clip, to_transformers
from craftor_rewards.paper import paper_scores
from craftor_rewards.preprocess import CLIP_MEAN, CLIP_STD

PROMPTS = ["a red circle", "a small blue star on a plain white background", "there is a big ring"]
SIZE, WIDTH = 32, 24
LAION_HEAD = Path(__file__).parents[2] / "shared/data/aesthetic_heads/sac+logos+ava1-l14-linearMSE.pth"


def random_clip(activation: str) -> tuple[CLIPModel, CLIPTokenizer]:
    """Two layers and two kinds of heads, 16 and 64 wide, with weights large enough for scores to differ."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    common = {"num_hidden_layers": 2, "hidden_act": activation, "projection_dim": WIDTH}
    text = {
        **common,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **common,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": 8,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()
    for parameter in clip.parameters():
        if parameter.ndim:
            parameter.data = torch.randn_like(parameter) * 0.1 if parameter.ndim > 1 else parameter.data + 0.05
    return clip, tokenizer


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """The layout of CLIP, PickScore and LAION's converted repositories."""
    folder = tmp_path_factory.mktemp("clip")
    clip, tokenizer = random_clip("quick_gelu")
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory, monkeypatch_heads):
    """The layout of HPS's and open_clip's checkpoints, half precision, with a tokenizer beside."""
    folder = tmp_path_factory.mktemp("hps")
    clip, tokenizer = random_clip("gelu")
    state = {name: tensor.half() for name, tensor in to_open_clip(clip.state_dict()).items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / "HPS.pt")
    tokenizer.save_pretrained(folder)
    return folder / "HPS.pt"


@pytest.fixture(scope="module")
def monkeypatch_heads():
    """The tiny image tower has a width nobody published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip_names._VISION_HEADS, 48, 3)
        yield


def pictures(height: int, width: int, num: int = 3) -> list[Image.Image]:
    """Smooth 8-bit colours with an edge; not noise, whose every pixel rounds independently."""
    y, x = np.mgrid[0:height, 0:width]
    images = []
    for i in range(num):
        waves = [128 + 100 * np.sin((i + 2) * x / width * (c + 1) + (c + i) * y / height) for c in range(3)]
        image = np.stack(waves, axis=-1)
        image[y > height * (i + 2) / 6] *= 0.4
        images.append(Image.fromarray(image.clip(0, 255).astype(np.uint8)))
    return images


def tensors(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255


def processed(images: list[Image.Image]) -> torch.Tensor:
    """The processor of the cards' examples: PIL bicubic on the shorter side, centre crop, /255, mean and std."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return processor(images, return_tensors="pt").pixel_values


def model_card_logits(folder: Path, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_per_image` of the batch, as PickScore's card computes them, and exp(logit_scale)."""
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        images = clip.get_image_features(pixel_values=pixels).pooler_output
        texts = clip.get_text_features(**tokens).pooler_output
        images, texts = (x / x.norm(dim=-1, keepdim=True) for x in (images, texts))
        return clip.logit_scale.exp() * (texts @ images.T).T, clip.logit_scale.exp()


@pytest.mark.parametrize(("shape", "tolerance"), [((SIZE, SIZE), 1e-4), ((96, 96), 2e-3), ((64, 101), 2e-3)])
def test_clip_score_and_pick_score(clip_folder, shape, tolerance):
    images = pictures(*shape)
    logits, scale = model_card_logits(clip_folder, processed(images))
    clip_score, pick_score = (
        build(kind, clip_folder)(tensors(images), PROMPTS) for kind in ("clip_score", "pick_score")
    )
    torch.testing.assert_close(clip_score, logits.diagonal() / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(pick_score, logits.diagonal(), rtol=tolerance, atol=tolerance * scale.item())
    assert clip_score.std() > 0.01, "a test that could not tell images apart would pass for any of them"


class OpenClip(nn.Module):
    """The ViT and text transformer of open_clip, restated with torch's own attention; its parameters have its names."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, hidden: int) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

        def forward(self, x, mask=None):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))

    def __init__(self, length: int, vocabulary: int) -> None:
        super().__init__()
        tower = nn.ModuleDict({"resblocks": nn.ModuleList(self.Block(48, 3, 96) for _ in range(2))})
        self.visual = nn.ModuleDict({"transformer": tower, "ln_pre": nn.LayerNorm(48), "ln_post": nn.LayerNorm(48)})
        self.visual["conv1"] = nn.Conv2d(3, 48, 8, 8, bias=False)
        for name, shape in {"class_embedding": (48,), "positional_embedding": (17, 48), "proj": (48, WIDTH)}.items():
            self.visual.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(self.Block(128, 2, 256) for _ in range(2))})
        self.token_embedding, self.ln_final = nn.Embedding(vocabulary, 128), nn.LayerNorm(128)
        self.positional_embedding = nn.Parameter(torch.zeros(length, 128))
        self.text_projection, self.logit_scale = nn.Parameter(torch.zeros(128, WIDTH)), nn.Parameter(torch.zeros(()))

    def encode_image(self, pixels):
        x = self.visual["conv1"](pixels).flatten(2).mT
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual["ln_pre"](x)
        for block in self.visual["transformer"]["resblocks"]:
            x = block(x)
        return F.normalize(self.visual["ln_post"](x[:, 0]) @ self.visual.proj, dim=-1)

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        return F.normalize(self.ln_final(x)[range(len(ids)), ids.argmax(1)] @ self.text_projection, dim=-1)


def letterboxed(image: Image.Image) -> torch.Tensor:
    """HPSv2's transform: to a tensor first, the longest side to SIZE, zeros around, then mean and std."""
    pixels = tensors([image])
    scale = SIZE / max(pixels.shape[2:])
    new = [round(side * scale) for side in pixels.shape[2:]]
    pixels = F.interpolate(pixels, size=new, mode="bicubic", antialias=True) if scale != 1 else pixels
    square = torch.zeros(1, 3, SIZE, SIZE)
    top, left = (SIZE - new[0]) // 2, (SIZE - new[1]) // 2
    square[:, :, top : top + new[0], left : left + new[1]] = pixels
    return (square - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (96, 96), (64, 101), (90, 40)], ids=str)
def test_hps_in_the_layout_of_its_checkpoint(hps_file, shape):
    images = pictures(*shape)
    tokenizer = CLIPTokenizer.from_pretrained(hps_file.parent)
    state = torch.load(hps_file, weights_only=True)["state_dict"]
    reference = OpenClip(tokenizer.model_max_length, len(tokenizer)).eval()
    reference.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        pixels = torch.cat([letterboxed(image) for image in images])
        expected = (reference.encode_image(pixels) * reference.encode_text(ids)).sum(1)
    scores = build("hps", hps_file)(tensors(images), PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert scores.std() > 0.01


def test_any_open_clip_checkpoint_makes_a_clip_score(hps_file, tmp_path):
    tensors_of_it = {name: tensor.contiguous() for name, tensor in load_tensors(hps_file).items()}
    save_file(tensors_of_it, tmp_path / "open_clip_model.safetensors")
    CLIPTokenizer.from_pretrained(hps_file.parent).save_pretrained(tmp_path)
    images = tensors(pictures(SIZE, SIZE))
    from_safetensors = build("clip_score", tmp_path / "open_clip_model.safetensors")(images, PROMPTS)
    torch.testing.assert_close(from_safetensors, build("hps", hps_file)(images, PROMPTS))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_names_convert_both_ways_without_loss(activation, monkeypatch_heads):
    clip, _ = random_clip(activation)
    state = clip.state_dict()
    theirs = to_open_clip(state)
    back = to_transformers(theirs)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    again = to_open_clip(back)
    assert again.keys() == theirs.keys() and all(torch.equal(again[name], theirs[name]) for name in theirs)
    assert theirs["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (144, 48)
    config = infer_config(theirs, activation=activation)
    for tower in ("text_config", "vision_config"):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"):
            assert getattr(getattr(config, tower), key) == getattr(getattr(clip.config, tower), key), (tower, key)
    assert config.vision_config.image_size == SIZE and config.projection_dim == WIDTH
    assert config.text_config.eos_token_id == clip.config.text_config.eos_token_id


@pytest.mark.parametrize(
    ("image", "text", "patch", "embedding", "num_millions"),
    [
        ((768, 12, 12, 3072), (512, 8, 12, 2048), 32, 512, 151.28),
        ((1024, 16, 24, 4096), (768, 12, 12, 3072), 14, 768, 427.62),
        ((1280, 16, 32, 5120), (1024, 16, 24, 4096), 14, 1024, 986.11),
        ((1408, 16, 40, 6144), (1024, 16, 24, 4096), 14, 1024, 1366.68),
    ],
    ids=["B/32", "L/14", "H/14", "g/14"],
)
def test_the_published_sizes_are_inferred_from_shapes(image, text, patch, embedding, num_millions):
    """Width, heads, layers and hidden width of each tower, and the published number of parameters."""
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    vision = {**dict(zip(keys, image, strict=True)), "image_size": 224, "patch_size": patch}
    config = CLIPConfig(text_config=dict(zip(keys, text, strict=True)), vision_config=vision, projection_dim=embedding)
    with torch.device("meta"):
        clip = CLIPModel(config)
    assert sum(p.numel() for p in clip.parameters()) / 1e6 == pytest.approx(num_millions, abs=0.01)
    inferred = infer_config(to_open_clip(clip.state_dict()))
    for tower, expected in (("vision_config", image), ("text_config", text)):
        assert tuple(getattr(getattr(inferred, tower), key) for key in keys) == expected
    assert (inferred.vision_config.image_size, inferred.vision_config.patch_size) == (224, patch)
    assert (inferred.projection_dim, inferred.text_config.max_position_embeddings) == (embedding, 77)
    assert inferred.text_config.eos_token_id == 49407


def test_what_is_no_clip_of_open_clip_is_refused(monkeypatch):
    monkeypatch.delitem(open_clip_names._VISION_HEADS, 48, raising=False)
    clip, _ = random_clip("gelu")
    theirs = to_open_clip(clip.state_dict())
    with pytest.raises(ValueError, match="unknown tensors visual.trunk.blocks.0.weight"):
        to_transformers({**theirs, "visual.trunk.blocks.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown tensors vision_model.head.probe"):
        to_open_clip({**clip.state_dict(), "vision_model.head.probe": torch.zeros(1)})
    with pytest.raises(ValueError, match="48 wide: give vision_heads; known widths: 384, 512"):
        infer_config(theirs)


def laion_mlp(width: int) -> nn.Sequential:
    """The head of the predictor's repository: linear layers with dropout between them."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()


def test_the_public_aesthetic_head_collapses_exactly():
    if not LAION_HEAD.is_file():
        pytest.skip(f"the public head is not at {LAION_HEAD}; `craftor rewards fetch laion-aesthetic-v2` fetches it")
    state = load_tensors(LAION_HEAD)
    mlp = laion_mlp(768)
    mlp.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
    features = F.normalize(torch.randn(1000, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    head = collapse(state)
    with torch.no_grad():
        torch.testing.assert_close(head(features), mlp(features).squeeze(1), rtol=0, atol=1e-5)
    assert head.layers[0].bias.item() == pytest.approx(5.2366, abs=1e-4)
    assert head.layers[0].weight.norm().item() == pytest.approx(17.996, abs=1e-3)


@pytest.mark.parametrize(("shape", "tolerance"), [((SIZE, SIZE), 1e-4), ((96, 96), 2e-2)])
def test_aesthetic_in_the_layout_of_the_public_head(clip_folder, tmp_path, shape, tolerance):
    torch.manual_seed(1)
    mlp = laion_mlp(WIDTH)
    torch.save({f"layers.{name}": tensor for name, tensor in mlp.state_dict().items()}, tmp_path / "head.pth")
    images = pictures(*shape)
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=processed(images)).pooler_output.numpy()
        norms = np.linalg.norm(features, axis=-1, keepdims=True)
        expected = mlp(torch.from_numpy(features / norms)).squeeze(1)
    reward = Aesthetic(tmp_path / "head.pth", clip=clip_folder)
    torch.testing.assert_close(reward(tensors(images), [""] * 3), expected, rtol=0, atol=tolerance)
    assert sum(p.numel() for p in reward.head.parameters()) == WIDTH + 1
    assert not any(name.startswith("towers.clip.text_model") for name, _ in reward.named_parameters())


def test_a_head_with_activations_is_not_collapsed(tmp_path, clip_folder):
    state = {f"layers.{i}.{kind}": torch.zeros(2, 2) for i in (0, 3, 6, 9, 11) for kind in ("weight", "bias")}
    torch.save(state, tmp_path / "relu.pth")
    with pytest.raises(ValueError, match="expected weight and bias of layers.0, layers.2, .*without activations"):
        Aesthetic(tmp_path / "relu.pth", clip=clip_folder)
    linear = collapse({"weight": torch.ones(1, 4), "bias": torch.tensor([2.0])})
    assert linear(torch.ones(3, 4)).tolist() == [6.0] * 3, "v1 is one layer already"


def test_the_papers_scores_are_theirs_and_not_ours(clip_folder, tmp_path):
    """Average pooling, and PickScore over every pair of the batch."""
    images = tensors(pictures(96, 96))
    pixels = (F.adaptive_avg_pool2d(images, SIZE) - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(
        CLIP_STD
    ).view(3, 1, 1)
    logits, scale = model_card_logits(clip_folder, pixels)
    pick_score, clip_score = build("pick_score", clip_folder), build("clip_score", clip_folder)
    paper = paper_scores(pick_score, images, PROMPTS)
    torch.testing.assert_close(paper.mean(), logits.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(paper_scores(clip_score, images, PROMPTS), logits.diagonal() / scale, rtol=0, atol=1e-4)
    alone = torch.cat([paper_scores(pick_score, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert (paper - alone).abs().max() > 0.05, "an image's score depends on its batch there"
    assert (paper_scores(clip_score, images, PROMPTS) - clip_score(images, PROMPTS)).abs().max() > 1e-4
    Head([WIDTH, 1], "identity").save(tmp_path, clip=str(clip_folder))
    assert paper_scores(build("aesthetic", tmp_path), images, PROMPTS).shape == (3,)


@pytest.mark.parametrize("kind", ["clip_score", "hps"])
def test_half_precision_of_the_image_tower_is_close_and_stays_inside(kind, clip_folder, hps_file):
    weights = clip_folder if kind == "clip_score" else hps_file
    images = tensors(pictures(48, 48))
    full, half = build(kind, weights), build(kind, weights, dtype=torch.bfloat16)
    assert half.towers.clip.vision_model.post_layernorm.weight.dtype == torch.bfloat16
    assert half.towers.clip.visual_projection.weight.dtype == torch.float32
    leaf = images.clone().requires_grad_(True)
    scores = half(leaf, PROMPTS)
    scores.sum().backward()
    assert scores.dtype == torch.float32 and leaf.grad.isfinite().all() and (leaf.grad != 0).float().mean() > 0.99
    torch.testing.assert_close(scores, full(images, PROMPTS), rtol=0, atol=0.02)


def test_checkpointing_recomputes_layers_and_changes_no_number(clip_folder):
    images = tensors(pictures(SIZE, SIZE))
    results = {}
    for checkpoint in (False, True):
        reward = build("clip_score", clip_folder, checkpoint=checkpoint).eval()
        calls: list[int] = []
        for layer in reward.towers.clip.vision_model.encoder.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        leaf = images.clone().requires_grad_(True)
        scores = reward(leaf, PROMPTS)
        scores.sum().backward()
        results[checkpoint] = (scores.detach(), leaf.grad, len(calls))
        assert not reward.towers.clip.vision_model.encoder.layers[0].self_attn.training
        assert not any(p.requires_grad or p.grad is not None for p in reward.parameters())
    assert torch.equal(results[True][0], results[False][0])
    torch.testing.assert_close(results[True][1], results[False][1])
    assert (results[False][2], results[True][2]) == (2, 4), "each of two layers runs once more in the backward pass"


def test_over_long_prompts_are_counted(clip_folder):
    towers = ClipTowers(clip_folder)
    long = " ".join(["a small red circle"] * 20)
    assert towers.truncated([PROMPTS[0], long]) == [False, True] and towers.truncated([]) == []
    assert towers.num_truncated == 0
    features = towers.text_features([long, PROMPTS[0], long + " and a star"])
    assert towers.num_truncated == 2
    towers.text_features([long])
    assert towers.num_truncated == 2, "a prompt in the cache is not counted again"
    torch.testing.assert_close(features[0], features[2]), "what is beyond the last token does not count"
    assert build("clip_score", clip_folder).truncated([long]) == [True]


def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"state_dict": {"weight": torch.zeros(1)}, "other": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt' holds a list; expected named tensors"):
        load_tensors(tmp_path / "list.pt")


def test_a_head_s_folder_may_name_a_clip_by_any_way(clip_folder, tmp_path):
    Head([WIDTH, 1], "identity").save(tmp_path, clip="clip-vit-l-14")
    assert json.loads((tmp_path / "head.json").read_text())["clip"] == "clip-vit-l-14"
    with pytest.raises(
        FileNotFoundError, match="no weights of 'clip-vit-l-14'.*openai/clip-vit-large-patch14.*1.71 GB"
    ):
        build("aesthetic", tmp_path)
    images = tensors(pictures(SIZE, SIZE))
    with_other = build("aesthetic", tmp_path, clip=clip_folder)
    assert with_other(images, PROMPTS).shape == (3,)
