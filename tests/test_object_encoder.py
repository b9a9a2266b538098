"""The object encoder: an exact null, files that stock pipelines read, what trains, what is dropped, what is refused."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tomli_w
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from craftor import checkpoint, customize, job, object_adapter, object_condition, registry
from craftor.customize import Guidance
from craftor.customize_files import Shown, customize_file, read_reference
from craftor.description import describe
from craftor.encoders import EncoderRefused, load_encoder, versions
from craftor.object_adapter import Tokens
from craftor.object_gauges import HeldOut, gauge
from craftor.object_rows import check_mixture
from craftor.recipe import Recipe, RecipeError
from craftor.registry import BundleError
from craftor.stream import Rows
from craftor.tasks.object_encoder import ObjectEncoderTask
from craftor_rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD
from encoder_bundles import new_store

PROMPTS = ["a small red star", "a large blue ring", "a large star", "a small ring"]
TOKENS: tuple[Tokens, ...] = ("pooled", "patches")


def _recipe(tiny: Path, folder: Path, **task: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "objects",
            "seed": 5,
            "model": {"path": f"{tiny}/pipeline"},
            "data": {"path": str(folder)},
            "task": {"kind": "object_encoder", "image_encoder": f"{tiny}/clip", **task},
            "optimizer": {"lr": 1e-2},
            "run": {"num_steps": 4, "batch_size": 4, "checkpoint_every": 2},
            "workers": {"num": 0},
        }
    )


def _columns(num: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with an object at every other place."""
    rng = np.random.default_rng(seed)
    domain = np.arange(num) % 2 == 1
    ids = rng.integers(0, 100, (num, 24)).astype(np.int32)
    ids[:, -1] = 285
    return {
        "index": np.arange(num),
        "prompt": np.array([PROMPTS[i % 4] for i in range(num)], dtype=object),
        "input_ids": ids,
        "latents": rng.standard_normal((num, 4 * 8 * 8)).astype(np.float16),
        "domain": domain,
        "mask": ((rng.random((num, 64)) < 0.4) * domain[:, None]).astype(np.float16),
        "reference": (rng.integers(0, 255, (num, 3 * 32 * 32)) * domain[:, None]).astype(np.uint8),
    }


def _task(tiny: Path, tmp_path: Path, **task: object) -> ObjectEncoderTask:
    return ObjectEncoderTask(_recipe(tiny, tmp_path, **task))


def _never() -> dict[str, float]:
    return {"text": 0.0, "object": 0.0, "both": 0.0}


def _disturb(module: nn.Module) -> None:
    """Weights as training might leave them; what does not train stays."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def _call(unet: UNet2DConditionModel, text: Tensor, seen: Tensor | None) -> Tensor:
    latents = torch.randn(len(text), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    added = None if seen is None else {"image_embeds": [seen]}
    with torch.no_grad():
        return unet(latents, 500, text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("tokens", TOKENS)
def test_no_object_is_the_base_model_to_the_bit(tiny: Path, tmp_path: Path, tokens: Tokens) -> None:
    task = _task(tiny, tmp_path, tokens=tokens, unet="frozen")
    _disturb(task.module)
    text = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(2))
    base = _call(task.diffuser.unet, text, None)
    shown = task.image_encoder(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)))
    assert (_call(task.unet, text, torch.zeros_like(shown)) - base).abs().max() == 0
    mixed = _call(task.unet, text, object_adapter.zero(shown, torch.tensor([True, False, True])))
    assert (mixed[1] - base[1]).abs().max() == 0
    assert (mixed[0] - base[0]).abs().max() > 1e-3 and (mixed[2] - base[2]).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_resnet_sees_objects_too_and_comes_back_from_a_run(tiny: Path, tmp_path: Path, tokens: Tokens) -> None:
    torch.manual_seed(4)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", image_size=32)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    task = _task(tiny, tmp_path, tokens=tokens, unet="frozen", image_encoder=str(tmp_path / "resnet"))
    images = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(4))
    shown = task.image_encoder(images)
    assert shown.shape == ((2, 1, 12) if tokens == "pooled" else (2, 1, 16, 12))
    pixels = task.image_encoder.pixels(images)
    assert torch.allclose(pixels[0, :, 0, 0], (0.5 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD))
    task.save(tmp_path / "saved")
    again = object_condition.load(tmp_path / "saved" / object_condition.FOLDER, tokens)
    assert torch.equal(again(images), shown)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_stock_pipeline_loads_what_was_saved(tiny: Path, tmp_path: Path, tokens: Tokens) -> None:
    task = _task(tiny, tmp_path, tokens=tokens)
    _disturb(task.module)
    task.save(tmp_path / "saved")
    pipe = StableDiffusionPipeline.from_pretrained(
        f"{tiny}/pipeline", unet=UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet"), safety_checker=None
    )
    pipe.load_ip_adapter(
        str(tmp_path / "saved"),
        subfolder="",
        weight_name=object_adapter.FILE,
        image_encoder_folder=object_condition.FOLDER,
    )
    ours = copy.deepcopy(task.diffuser.unet)
    ours.load_state_dict(object_adapter.without_adapter(task.unet).state_dict())
    ours.set_attn_processor(AttnProcessor2_0())  # the pipeline's, as is its layout
    ours.to(memory_format=torch.contiguous_format)
    object_adapter.install(ours, object_adapter.extract(task.unet))
    text = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(2))
    shown = task.image_encoder(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)))
    theirs = _call(pipe.unet, text, shown)
    assert (theirs - _call(ours, text, shown)).abs().max() == 0
    torch.testing.assert_close(theirs, _call(task.unet.eval(), text, shown), atol=1e-4, rtol=1e-4)


def test_equal_weights_are_a_stock_pipeline_s_guidance(tiny: Path, tmp_path: Path) -> None:
    task = _task(tiny, tmp_path, tokens="pooled")
    _disturb(task.module)
    task.save(tmp_path / "saved")
    customizer = customize.assemble(task.diffuser, tmp_path / "saved")
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).movedim(-1, 0)[None]
    ours = customizer.generate(PROMPTS[:1], pixels, noise, Guidance(4, 3.0, 3.0))
    pipe = StableDiffusionPipeline.from_pretrained(
        f"{tiny}/pipeline",
        unet=UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet"),
        scheduler=task.diffuser.scheduler,
        safety_checker=None,
    )
    pipe.load_ip_adapter(
        str(tmp_path / "saved"),
        subfolder="",
        weight_name=object_adapter.FILE,
        image_encoder_folder=object_condition.FOLDER,
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS[:1],
        ip_adapter_image=picture,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours.clamp(0, 1), theirs, atol=2e-3, rtol=0)


def test_weights_of_text_and_object_are_apart(tiny: Path, tmp_path: Path) -> None:
    task = _task(tiny, tmp_path, unet="frozen")
    _disturb(task.module)
    task.save(tmp_path / "saved")
    customizer = customize.assemble(task.diffuser, tmp_path / "saved")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def made(*weights: float, shown: Tensor | None = reference) -> Tensor:
        return customizer.generate(PROMPTS[:1], shown, noise, Guidance(3, *weights))

    none = made(3.0, 0.0, shown=None)
    assert torch.equal(made(3.0, 0.0), none) and torch.equal(made(3.0, 3.0, 3), none)
    assert not torch.equal(made(3.0, 2.0), made(3.0, 1.0)) and not torch.equal(made(2.0, 2.0), made(3.0, 2.0))
    torch.testing.assert_close(made(3.0, 3.0 + 1e-6), made(3.0, 3.0), atol=1e-3, rtol=0)  # three calls, and two


def test_objects_are_seen_where_their_regions_are(tiny: Path, tmp_path: Path) -> None:
    """Nowhere is the base, everywhere is no region at all; of two objects, each has its say in its own part."""
    task = _task(tiny, tmp_path, unet="frozen")
    _disturb(task.module)
    task.save(tmp_path / "saved")
    customizer = customize.assemble(task.diffuser, tmp_path / "saved")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    one, other = (torch.rand(1, 3, size, size, generator=generator) for size in (32, 40))

    def made(references: Any, regions: Tensor | None = None) -> Tensor:
        return customizer.generate(PROMPTS[:1], references, noise, Guidance(3, 3.0, 2.0), regions)

    everywhere, nowhere, left = torch.ones(1, 16, 16), torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[:, :, :8] = 1
    assert torch.equal(made([one], nowhere), made(None))
    torch.testing.assert_close(made([one], everywhere), made(one), atol=1e-5, rtol=1e-5)
    halves = torch.cat([left, 1 - left])
    apart, together = made([one, other], halves), made([one, other])
    assert not torch.allclose(apart, together) and not torch.allclose(apart, made([one], left))
    torch.testing.assert_close(made([other, one], halves.flip(0)), apart, atol=1e-5, rtol=1e-5)


def test_a_region_is_read_at_any_size_and_refused_where_it_is_nowhere(tmp_path: Path) -> None:
    picture = Image.new("L", (100, 50), 0)
    picture.paste(255, (50, 0, 100, 50))
    picture.save(tmp_path / "right.png")
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    place = Shown(tmp_path / "x.png", region=tmp_path / "right.png").place(8)
    assert place.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 8
    for name, message in (("black.png", "region: black everywhere"), ("text.png", "region: ")):
        with pytest.raises(RecipeError, match=f"{name}: {message}"):
            Shown(tmp_path / "x.png", region=tmp_path / name).place(8)


@pytest.mark.parametrize("unet", ["frozen", {"method": "full"}, {"method": "lora", "rank": 2}])
def test_what_trains_moves_and_nothing_else(tiny: Path, tmp_path: Path, unet: object) -> None:
    task = _task(tiny, tmp_path, unet=unet, dropout=_never())
    before = {name: p.detach().clone() for name, p in task.unet.named_parameters()}
    optimizer = torch.optim.AdamW(checkpoint.trained(task.module).values(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        task.step(Rows([4 * step + i for i in range(4)], _columns()))
        assert all(p.grad is not None for p in checkpoint.trained(task.module).values())
        optimizer.step()
    task.assert_frozen()
    moved = {name for name, p in task.unet.named_parameters() if not torch.equal(p, before[name])}
    added = set(object_adapter.parameters(task.unet))
    biases = {name for name in before if name.startswith("encoder_hid_proj.") and name.endswith(".bias")}
    assert added <= moved and not biases & moved
    assert all(before[name].abs().max() == 0 for name in biases)
    others = set(before) - added - biases
    if unet == "frozen":
        assert not others & moved
    else:
        expected = {name for name in others if "lora" in name} if "lora" in str(unet) else others
        assert expected and others & moved == expected


def test_general_rows_see_no_object_and_domain_rows_pay_for_its_cells(tiny: Path, tmp_path: Path) -> None:
    columns = _columns()
    task = _task(tiny, tmp_path, dropout=_never(), identity_weight=0.5)
    found = task.step(Rows([0, 1, 2, 3], columns))
    domain = torch.tensor([False, True, False, True])
    assert torch.equal(found["domain"] > 0, domain)
    assert (found["object_error"][~domain] == 0).all() and (found["object_error"][domain] > 0).all()
    figures = task.observe(found)
    assert figures["domain_share"] == 0.5
    assert figures["error_object"] == pytest.approx(found["object_error"][domain].mean().item())

    other = {**columns, "reference": columns["reference"][::-1].copy()}
    other["reference"][::2] = 200  # of general rows: never looked at
    task.module.zero_grad()
    again = task.step(Rows([0, 1, 2, 3], other))
    assert torch.equal(again["error"][~domain], found["error"][~domain])
    assert not torch.equal(again["error"][domain], found["error"][domain])

    whole = {**columns, "mask": np.ones_like(columns["mask"])}
    everywhere = task.step(Rows([0, 1, 2, 3], whole))
    torch.testing.assert_close(everywhere["object_error"][domain], everywhere["error"][domain])


def test_conditions_are_dropped_as_often_as_asked(tiny: Path, tmp_path: Path) -> None:
    task = _task(tiny, tmp_path, dropout={"text": 0.1, "object": 0.2, "both": 0.3})
    text, seen = task.kept(list(range(4000)))
    shares = [(~text & seen), (text & ~seen), (~text & ~seen)]
    assert [round(share.float().mean().item(), 1) for share in shares] == [0.1, 0.2, 0.3]
    assert torch.equal(task.kept([17])[0], text[17:18])


def test_an_ip_adapter_file_is_a_starting_point(tiny: Path, tmp_path: Path) -> None:
    first = _task(tiny, tmp_path, unet="frozen")
    _disturb(first.module)
    state = object_adapter.extract(first.unet)
    state["image_proj"]["proj.3.bias"] += 1.0  # as one from elsewhere would have
    flat = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
    save_file(flat, tmp_path / "given.safetensors")
    again = object_adapter.extract(_task(tiny, tmp_path, adapter=str(tmp_path / "given.safetensors")).unet)
    for name, tensor in state["ip_adapter"].items():
        assert torch.equal(again["ip_adapter"][name], tensor)
    assert again["image_proj"]["proj.3.bias"].abs().max() == 0
    with pytest.raises(ValueError, match="made for patches of width 16, but task.tokens"):
        _task(tiny, tmp_path, adapter=str(tmp_path / "given.safetensors"), tokens="pooled")


def test_adapters_of_other_architectures_and_other_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    task = _task(tiny, tmp_path)
    state = object_adapter.extract(task.unet)
    wider = {**state, "ip_adapter": {**state["ip_adapter"], "1.to_k_ip.weight": torch.zeros(320, 768)}}
    with pytest.raises(ValueError, match=r"1.to_k_ip.weight is \(320, 768\), and this UNet takes"):
        object_adapter.install(copy.deepcopy(task.diffuser.unet), wider)
    with pytest.raises(ValueError, match="not an IP-Adapter of a form that is read here"):
        object_adapter.tokens_of({"image_proj": {"latents": torch.zeros(1)}, "ip_adapter": {}})
    save_file({"unet.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="it holds unet.weight"):
        object_adapter.read(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="allowed: a .safetensors file"):
        object_adapter.read(tmp_path / "ip-adapter_sd15.bin")
    with pytest.raises(ValueError, match="no CLIP and no ResNet there"):
        object_condition.load(tmp_path, "pooled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"domain_share": 0.4}}, r"task.domain_share = 0.4 of run.batch_size = 4 is 1.6 rows"),
        ({"task": {"dropout": {"both": 0.95}}}, "text \\+ object \\+ both = 1.05; allowed: less than 1"),
        ({"model": {"precision": "fp16"}}, "fp16"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tiny: Path, tmp_path: Path, change: dict, message: str) -> None:
    data = _recipe(tiny, tmp_path).data_of()
    for section, values in change.items():
        data[section] = {**data.get(section, {}), **values}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(data)


def _write(folder: Path, columns: dict[str, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    table = {name: list(values) if values.ndim > 1 else values for name, values in columns.items()}
    pa.parquet.write_table(pa.table(table), folder / "rows.parquet")


def test_rows_that_would_not_mix_evenly_are_refused(tiny: Path, tmp_path: Path) -> None:
    columns = _columns(12)
    _write(tmp_path / "even", columns)
    check_mixture(_recipe(tiny, tmp_path / "even"), Path("r.toml"))
    with pytest.raises(RecipeError, match="the batch from row 0 has 2 rows with an object of 4, but .* asks for 1"):
        check_mixture(_recipe(tiny, tmp_path / "even", domain_share=0.25), Path("r.toml"))
    late = {**columns, "domain": np.array([False, True] * 4 + [False] * 4)}
    _write(tmp_path / "late", late)
    with pytest.raises(RecipeError, match="the batch from row 8 has 0 rows"):
        check_mixture(_recipe(tiny, tmp_path / "late"), Path("r.toml"))
    _write(tmp_path / "plain", {name: column for name, column in columns.items() if name != "reference"})
    with pytest.raises(RecipeError, match="rows.parquet has no column 'reference'"):
        check_mixture(_recipe(tiny, tmp_path / "plain"), Path("r.toml"))


def test_gauges_see_no_difference_where_the_object_has_no_say(tiny: Path, tmp_path: Path) -> None:
    task = _task(tiny, tmp_path, unet="frozen")
    state = object_adapter.extract(task.unet)
    silent = {name: torch.zeros_like(t) if "to_v_ip" in name else t for name, t in state["ip_adapter"].items()}
    generator = torch.Generator().manual_seed(0)
    images, others = torch.rand(2, 3, 3, 32, 32, generator=generator)
    masks = torch.zeros(3, 1, 32, 32)
    masks[:, :, 8:24, 8:24] = 1
    held_out = HeldOut(images, masks, PROMPTS[:3], others)
    found = {}
    for name, tensors in (("silent", silent), ("loud", state["ip_adapter"])):
        unet = copy.deepcopy(task.diffuser.unet)
        object_adapter.install(unet, {**state, "ip_adapter": tensors}, eager=True)
        found[name] = gauge(customize.Customizer(task.diffuser, unet, task.image_encoder), held_out, seed=1)
    assert found["silent"]["copy_gap"] == 0
    assert found["silent"]["loss_matched"] == found["silent"]["loss_none"] == found["silent"]["loss_shuffled"]
    assert found["loud"]["loss_matched"] != found["loud"]["loss_none"] == found["silent"]["loss_none"]
    assert found["loud"]["loss_matched"] != found["loud"]["loss_shuffled"]


def test_a_reference_is_cut_out_by_its_mask_or_its_transparency(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    half = Image.new("L", (8, 4), 0)
    half.paste(255, (0, 0, 4, 4))

    def data(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    by_mask = read_reference(data(image), data(half))
    clear = image.copy()
    clear.putalpha(half)
    assert torch.equal(by_mask, read_reference(data(clear), None))
    assert by_mask[0, :, 0, 0].tolist() == [1, 0, 0] and by_mask[0, :, 0, -1].tolist() == [0.5, 0.5, 0.5]
    assert read_reference(data(image), None)[0, 1].max() == 0
    with pytest.raises(ValueError, match="mask: 4x4 pixels, image has 8x4; allowed: the same size"):
        read_reference(data(image), data(half.crop((0, 0, 4, 4))))
    with pytest.raises(ValueError, match="mask: empty, black or transparent everywhere: there is no object in 8x4"):
        read_reference(data(image), data(Image.new("L", (8, 4), 0)))


@pytest.mark.ray
def test_a_run_trains_resumes_to_the_same_bits_and_customizes(
    tiny: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "rows", _columns(12))
    recipe, run = _recipe(tiny, tmp_path / "rows"), tmp_path / "runs" / "objects"
    trained = job.train(recipe, tmp_path / "recipe.toml", run)
    assert checkpoint.step_of(trained.checkpoint) == 4
    first = {path.name: load_file(path) for path in trained.checkpoint.rglob("*.safetensors")}
    assert {"ip_adapter.safetensors", "diffusion_pytorch_model.safetensors"} <= first.keys()
    for path in trained.checkpoint.rglob("*"):
        if path.is_file():
            path.unlink()  # as if it had been killed after step 3
    again = job.resume(run)
    for path in again.checkpoint.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, first[path.name][name]), (path.name, name)
    Image.new("RGBA", (40, 30), (255, 0, 0, 200)).save(tmp_path / "x.png")
    sheet = customize_file(
        [Shown(tmp_path / "x.png")], PROMPTS[0], str(run), tmp_path / "out.png", 2, 0, Guidance(2, 2.0, 1.0)
    )
    assert Image.open(sheet).size == (64, 32)


def test_an_object_encoder_is_registered_and_loaded_by_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRAFTOR_CACHE", str(tmp_path / "cache"))
    connected = new_store(tmp_path / "runs")
    task = _task(tiny, tmp_path, tokens="pooled", domain="dogs")
    _disturb(task.module)
    task.save(tmp_path / "saved")
    recipe = _recipe(tiny, tmp_path, tokens="pooled", domain="dogs")
    bundle = registry.write_bundle(recipe, task.diffuser, tmp_path / "saved", tmp_path / "bundle")
    registry.add(connected, bundle, "objects", ["champion"])
    (found,) = versions(connected)
    assert (found.tags["craftor.kind"], found.tags["craftor.domain"]) == ("object_encoder", "dogs")
    assert found.tags["craftor.window"] == "999..0"
    loaded = customize.load("models:/objects@champion", runs=tmp_path / "runs")
    text, seen = torch.rand(1, 24, 16), loaded.encoder(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(_call(loaded.unet, text, seen), _call(task.unet.eval(), text, seen))
    with pytest.raises(EncoderRefused, match="an object encoder, no text encoder; use it by: craftor customize"):
        load_encoder(found, task.diffuser)
    (bundle / "encoder.toml").write_text((bundle / "encoder.toml").read_text().replace('unet_sha256 = "', "&0"))
    with pytest.raises(BundleError, match="encoder.toml"):
        customize.load(bundle)
    other = describe(recipe, task.diffuser)
    other["base"]["unet_sha256"] = "0" * 64
    (bundle / "encoder.toml").write_text(tomli_w.dumps(other))
    (bundle / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.digests(bundle)))
    with pytest.raises(EncoderRefused, match="made for a unet that .* does not have any more"):
        customize.load(bundle)
    with pytest.raises(RecipeError, match="no run there"):
        customize.load(tmp_path / "nothing")
