"""Pictures of objects in folders: captions and masks for each, pairs of them, and what is left out and why."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    Sam2Config,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
    ViTImageProcessorPil,
)
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig

from craftor import uploads
from craftor.locate import locate
from craftor.object_data import captioners, describing, framing, pairing
from craftor.object_data.captioners import AttributeReader, merge
from craftor.object_data.describing import Describe
from craftor.object_data.held_out import held_out_objects, metrics, tell
from craftor.object_data.masks import Outline, Segmenter
from craftor.object_data.pairing import Made, MakeRows, pattern
from craftor.object_data.settings import Attributes, Captioner, Masks, ObjectData, load
from craftor.object_data.sources import find, parts
from craftor.object_rows import check_mixture
from craftor.recipe import Recipe, RecipeError
from craftor.statistics import paired
from craftor_micro.captioner import MicroCaptioner
from craftor_micro.object_render import render_views
from craftor_micro.objects import sample_views
from craftor_micro.tokenizer import build_tokenizer

MICRO = "craftor_micro.captioner:MicroCaptioner"


def _save(image: Tensor, path: Path, mask: Tensor | None = None) -> None:
    """As a file with its transparency where a mask is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [image] if mask is None else [image, mask]
    pixels = (torch.cat(layers).movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)


def _folder(folder: Path, counts: tuple[int, ...] = (3, 1)) -> Path:
    """Micro objects with so many pictures each; the first picture's mask is a file, the others' are transparency."""
    for number, count in enumerate(counts):
        rendered = render_views(sample_views(torch.full((count,), 40 * number), 7 + number))
        for i, (image, mask) in enumerate(zip(*rendered, strict=True)):
            path = folder / f"object{number}" / f"{i}.png"
            _save(image, path, None if i == 0 else mask)
            if i == 0:
                _save(mask, path.with_suffix(".mask.png"))
    return folder


def _settings(images: Path, **changes: object) -> ObjectData:
    return ObjectData.model_validate({"images": str(images), "captioner": {"model": MICRO}, **changes})


def _describe(settings: ObjectData, out: Path) -> list[dict]:
    """Without Ray: what an actor makes of every part."""
    out.mkdir(exist_ok=True)
    actor = Describe(settings.model_dump(), str(out))
    for part in parts(find(Path(settings.images)), settings.pictures_per_part):
        name = describing._name(part, settings)
        actor({"name": name, "sources": json.dumps([describing._plain(source) for source in part])})
    return [row for path in describing.files(out) for row in pyarrow.parquet.read_table(path).to_pylist()]


def test_every_picture_gets_a_caption_of_its_scene_and_its_mask(tmp_path: Path) -> None:
    rows = _describe(_settings(_folder(tmp_path / "photos"), pictures_per_part=1), tmp_path / "out")
    assert {row["key"]: row["mask_from"] for row in rows} == {
        "object0/0.png": "file",
        "object0/1.png": "transparency",
        "object0/2.png": "transparency",
        "object1/0.png": "file",
    }
    for row in rows:
        image, mask = uploads.picture(row["image"]).image, uploads.mask(row["mask"])
        assert mask.shape[1:] == image.shape[1:] and (mask > 0.5).any()
        assert "background" in row["caption"] or "backdrop" in row["caption"]
    assert len(describing.files(tmp_path / "out")) == 2, "an object's pictures stay together"


def test_pictures_of_no_use_are_left_out_with_the_reason(tmp_path: Path) -> None:
    photos = _folder(tmp_path / "photos", (2,))
    plain = torch.rand(3, 64, 64)
    _save(plain, photos / "object0" / "bare.png")
    _save(plain, photos / "object0" / "small.png")
    _save(torch.ones(1, 32, 32), photos / "object0" / "small.mask.png")
    _save(plain, photos / "object0" / "none.png")
    _save(torch.zeros(1, 64, 64), photos / "object0" / "none.mask.png")
    (photos / "object0" / "broken.png").write_bytes(b"no picture")
    rows = _describe(_settings(photos), tmp_path / "out")
    assert [row["key"] for row in rows] == ["object0/0.png", "object0/1.png"]
    (path,) = describing.files(tmp_path / "out")
    reasons = {row["key"]: row["reason"] for row in describing._left_out(path)}
    assert "no mask; expected bare.mask.png" in reasons["object0/bare.png"]
    assert "its mask has 32x32 pixels, the picture 64x64" in reasons["object0/small.png"]
    assert "the mask is empty" in reasons["object0/none.png"]
    assert "not a picture of an allowed format" in reasons["object0/broken.png"]


@pytest.mark.ray
def test_a_description_goes_on_where_it_stopped_and_rows_train_an_object_encoder(tmp_path: Path, cluster: None) -> None:
    photos, out = _folder(tmp_path / "photos"), tmp_path / "out"
    settings = _settings(photos, pictures_per_part=1)
    first = describing.describe(settings, out)
    assert (first.num_pictures, first.num_made, first.left_out) == (4, 4, [])
    kept, gone = describing.files(out)
    when = kept.stat().st_mtime_ns
    gone.unlink()
    again = describing.describe(settings, out)
    assert again.num_pictures == 4 and 0 < again.num_made < 4
    assert kept.stat().st_mtime_ns == when
    general = tmp_path / "general"
    general.mkdir()
    pa.parquet.write_table(
        pa.table({"image": [_bytes(torch.rand(3, 40, 64)) for _ in range(3)], "caption": ["a red star"] * 3}),
        general / "0.parquet",
    )
    made = Made(locate("micro:base"), locate("micro:reward_clip"), 0)
    found = pairing.pair(out, general, tmp_path / "rows", made, repeats=3)
    assert (found.num_rows, found.num_domain, found.num_objects, found.num_alone) == (24, 12, 2, 1)
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"path": "micro:base"},
            "data": {"path": str(tmp_path / "rows")},
            "task": {"kind": "object_encoder", "image_encoder": "micro:reward_clip"},
            "optimizer": {"lr": 1e-3},
            "run": {"num_steps": 1, "batch_size": 4},
        }
    )
    check_mixture(recipe, Path("r.toml"))
    table = pyarrow.parquet.read_table(sorted((tmp_path / "rows").glob("*.parquet")))
    assert table["index"].to_pylist() == list(range(24))


def test_targets_and_references_are_different_pictures_of_one_object(tmp_path: Path) -> None:
    _describe(_settings(_folder(tmp_path / "photos", (2, 1)), pictures_per_part=9), tmp_path / "out")
    (path,) = describing.files(tmp_path / "out")
    make = MakeRows(Made(locate("micro:base"), locate("micro:reward_clip"), 0))
    jobs = json.dumps([(0, 0), (1, 1), (2, 2)])
    rows = make({"path": str(path), "domain": True, "jobs": jobs})
    pictures = pyarrow.parquet.read_table(path).to_pylist()
    shown = [np.asarray(row["reference"]).reshape(3, 64, 64) for row in rows]
    for row, other in ((0, 1), (1, 0)):
        image, mask = (
            f(pictures[other][key])
            for f, key in ((lambda d: uploads.picture(d).image, "image"), (uploads.mask, "mask"))
        )
        inside = (mask == 1).expand(3, -1, -1).numpy()
        assert np.abs(shown[row] / 255 - image.numpy())[inside].max() < 0.01
        assert rows[row]["mask"].max() == 1 and rows[row]["domain"]
    image = uploads.picture(pictures[2]["image"]).image.numpy()
    inside = (uploads.mask(pictures[2]["mask"]) == 1).expand(3, -1, -1).numpy()
    assert np.abs(shown[2] / 255 - image)[inside].mean() > 0.02, "the single picture is disturbed"
    again = make({"path": str(path), "domain": True, "jobs": jobs})
    assert all(np.array_equal(a["reference"], b["reference"]) for a, b in zip(rows, again, strict=True))


def test_patterns_have_the_share_in_every_window() -> None:
    assert pattern(6, 0.5).tolist() == [False, True] * 6
    assert pattern(7, 0.75).tolist() == [False, True, True, True] * 2
    assert pattern(3, 1.0).all()
    with pytest.raises(ValueError, match="2 rows with an object cannot be 0.75 of any"):
        pattern(2, 0.75)


def test_general_pictures_are_asked_for(tmp_path: Path) -> None:
    made = Made("micro:base", "micro:reward_clip", 0)
    with pytest.raises(ValueError, match="nothing described in it; make it with: craftor objects describe"):
        pairing.pair(tmp_path, None, tmp_path / "rows", made)
    _describe(_settings(_folder(tmp_path / "photos", (1,))), tmp_path / "out")
    with pytest.raises(ValueError, match="no --general has no Parquet of image and caption"):
        pairing.pair(tmp_path / "out", None, tmp_path / "rows", made)
    for described, general in ((tmp_path / "out" / "cats", None), (tmp_path / "cats", tmp_path / "out")):
        with pytest.raises(ValueError, match="what is in it goes"):
            pairing.pair(described, general, tmp_path / "out", made)
    assert list((tmp_path / "out").iterdir()), "nothing has gone"


def test_targets_are_cropped_around_the_object_and_references_not_at_all() -> None:
    image, mask = torch.rand(3, 20, 50), torch.zeros(1, 20, 50)
    mask[:, 5:15, 38:46] = 1
    target, covered = framing.around(image, mask, 20)
    assert torch.equal(target, image[:, :, 30:50]) and torch.equal(covered, mask[:, :, 30:50])
    shown = framing.cut_out(image, mask, torch.tensor([0.1, 0.2, 0.3]), 50)
    assert torch.equal(shown[:, 15:35][mask.expand(3, -1, -1) == 1], image[mask.expand(3, -1, -1) == 1])
    assert torch.equal(shown[:, 0, 0], torch.tensor([0.1, 0.2, 0.3]))
    generator = torch.Generator().manual_seed(0)
    moved, moved_mask = framing.disturbed(image, mask, generator)
    assert moved.shape == image.shape and 0.3 < moved_mask.sum() / mask.sum() < 3


@pytest.mark.parametrize(
    ("caption", "attributes", "kind", "expected"),
    [
        ("A dog on a sofa.", ["indoors", "wearing a hat"], "dog", "A dog on a sofa, indoors, wearing a hat"),
        ("a dog indoors", ["indoors"], "", "a dog indoors"),
        ("it sleeps", [], "dog", "a dog, it sleeps"),
        ("", ["outdoors"], "dog", "a dog, outdoors"),
    ],
)
def test_captions_get_what_they_do_not_say_yet(caption: str, attributes: list[str], kind: str, expected: str) -> None:
    assert merge(caption, attributes, kind) == expected


def test_attributes_are_said_where_clip_is_sure_enough() -> None:
    images = list(render_views(sample_views(torch.arange(0, 80, 10), 3)).images)
    lists = {"ground": ["white background", "black background"]}
    settings = Attributes.model_validate({"model": "micro:reward_clip", "lists": lists, "template": "{}", "least": 0.0})
    said = AttributeReader(settings)(images)
    assert all(len(words) == 1 for words in said)
    assert AttributeReader(settings.model_copy(update={"least": 1.0}))(images) == [[] for _ in images]


def test_blip_captions_pictures_of_any_size(tmp_path: Path) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    special = {"vocab_size": len(words), "bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**tower, **special, "encoder_hidden_size": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
    )
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path / "blip")
    caption = captioners.build(Captioner(model=str(tmp_path / "blip"), max_new_tokens=3))
    said = caption([torch.rand(3, 40, 64), torch.rand(3, 32, 32)])
    assert len(said) == 2 and all(set(sentence.split()) <= set(words) for sentence in said)


def test_clipseg_finds_a_mask_of_the_pictures_size(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        conditional_layer=0,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(tmp_path / "seg")
    CLIPSegProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(
        tmp_path / "seg"
    )
    (mask,) = Segmenter(Masks(model=str(tmp_path / "seg"), threshold=0.01))([torch.rand(3, 40, 64)])
    assert mask.shape == (1, 40, 64) and set(mask.unique().tolist()) <= {0.0, 1.0} and mask.max() == 1
    with pytest.raises(ValueError, match="masks.model = .* no CLIPSegForImageSegmentation there"):
        Segmenter(Masks(model=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="masks.outline = .* no Sam2Model there.*hf download"):
        Segmenter(Masks(model=str(tmp_path / "seg"), outline=str(tmp_path / "nothing")))

    save_tiny_sam(tmp_path / "sam")
    segment = Segmenter(Masks(model=str(tmp_path / "seg"), outline=str(tmp_path / "sam"), threshold=0.01))
    (outlined,) = segment([torch.rand(3, 40, 64)])
    assert outlined.shape == (1, 40, 64) and set(outlined.unique().tolist()) <= {0.0, 1.0}


def test_an_outline_follows_the_picture_in_the_rough_masks_box(tmp_path: Path) -> None:
    """Box and pixels reach SAM 2 in its own coordinates."""
    save_tiny_sam(tmp_path)
    outline, seen = Outline(str(tmp_path), torch.device("cpu")), {}
    real = outline.model.forward

    def watch(**inputs: Any) -> Any:
        seen.update(inputs)
        return real(**inputs)

    outline.model.forward = watch
    rough = torch.zeros(1, 32, 128)
    rough[:, 8:16, 32:96] = 1
    mask = outline(torch.full((3, 32, 128), 0.485), rough)
    assert mask.shape == (1, 32, 128)
    assert seen["input_boxes"].flatten().tolist() == [16, 16, 48, 32]
    assert seen["pixel_values"].shape == (1, 3, 64, 64) and seen["pixel_values"][0, 0].abs().max() < 1e-5


def save_tiny_sam(folder: Path) -> None:
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 2, 4, 2],
        window_positional_embedding_background_size=[2, 2],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=16, image_size=64, mask_input_channels=8),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    torch.manual_seed(0)
    Sam2Model(config).save_pretrained(folder)


def test_captioners_that_are_not_there_are_named(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ValueError, match="no model there and none in the local hub cache"):
        captioners.build(Captioner(model=str(tmp_path / "blip")))
    with pytest.raises(ValueError, match="a clip; allowed: blip, florence2"):
        captioners.build(Captioner(model=f"{tiny}/clip"))
    with pytest.raises(ValueError, match="not to be imported"):
        captioners.build(Captioner(model="craftor_micro.captioner:Nobody"))
    assert isinstance(captioners.build(Captioner(model=MICRO)), MicroCaptioner)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images = ", "not TOML"),
        ('images = "nowhere"\ncaptioner = { model = "x" }', "images = 'nowhere': no such folder"),
        ('images = "."', "captioner: Field required"),
        (
            'images = "."\ncaptioner = { model = "x" }\nattributes = { model = "y", lists = { place = ["indoors"] } }',
            "place has 1 attributes; allowed: two or more",
        ),
        ('images = "."\ncaptioner = { model = "x" }\nmask = 1', "mask: Extra inputs"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "objects.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "objects.toml")


def test_objects_are_gauged_by_two_pictures_of_each(tmp_path: Path) -> None:
    _describe(_settings(_folder(tmp_path / "photos", (2, 3, 1))), tmp_path / "out")
    customizer = SimpleNamespace(diffuser=SimpleNamespace(latent_shape=(8, 16, 16), pixels_per_latent=4))
    held_out = held_out_objects(tmp_path / "out", customizer, 9)
    assert held_out.images.shape == held_out.others.shape == (2, 3, 64, 64) and len(held_out.captions) == 2
    assert (held_out.others[:, :, 0, 0] == 0.5).all() and (held_out.masks.flatten(1).amax(1) > 0.5).all()
    with pytest.raises(ValueError, match="1 objects with two pictures; allowed: two or more"):
        held_out_objects(tmp_path / "out", customizer, 1)
    losses = np.array([[0.3], [0.31], [0.3]])
    found = {
        **{"loss_matched": 0.3, "loss_none": 0.5, "loss_shuffled": 0.9, "copy_gap": 0.034},
        "matched_to_none": paired(losses, losses + 0.2),
        "none_to_shuffled": paired(losses + 0.2, losses + 0.6),
        "itself_to_matched": paired(losses - 0.01, losses),
    }
    score = metrics(found)["object_loss"]
    assert score["delta"] == pytest.approx(-0.2) and score["base"] > score["tuned"] and score["ci95"][1] < 0
    said = tell(found, 3)
    assert "it carries identity" in said[1] and "+3.4 %" in said[2] and "gains from copying" in said[2]
    assert "not carry identity yet" in tell({**found, "none_to_shuffled": paired(losses, losses)}, 3)[1]


def test_folders_without_pictures_and_masks_without_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures; expected IDENTITY/NAME.png"):
        find(tmp_path)
    _save(torch.ones(1, 8, 8), tmp_path / "dog" / "a.mask.png")
    with pytest.raises(ValueError, match="a mask without a picture beside it"):
        find(tmp_path)


def _bytes(image: Tensor) -> bytes:
    file = io.BytesIO()
    captioners.as_pil(image).save(file, "PNG")
    return file.getvalue()
