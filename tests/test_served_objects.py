"""Objects in the engine: they share calls with rows that have none, which cannot tell, and draw as elsewhere."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from craftor import customize, object_adapter, object_condition
from craftor.customize import Guidance
from craftor.diffuser import Diffuser, load
from craftor.encoders import EncoderRefused
from craftor.recipe import Model
from craftor.serving.control import Control, load_controlnet
from craftor.serving.engine import Engine
from craftor.serving.objects import ON_THE_SHELF, ObjectEncoder, Reference, Shown, load_object_encoder, object_encoders
from craftor.serving.settings import OBJECT_SLOTS, EngineSettings
from craftor.serving.upload import Upload
from craftor.serving.work import ImageRequest, Share, first_noise
from serving_parts import drain, encoded, tuned, write_controlnet, write_object_bundle, write_tuned_bundle

PROMPT = "a small red star"


@pytest.fixture(scope="module")
def base(tiny: Path) -> Diffuser:
    return load(Model(path=str(tiny / "pipeline")))


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_object_bundle(tiny, tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def objects(bundle: Path, base: Diffuser) -> ObjectEncoder:
    return load_object_encoder(bundle, base)


@pytest.fixture(scope="module")
def engine(base: Diffuser) -> Iterator[Engine]:
    one = Engine(base, EngineSettings(bucket=8, queue_seconds=1000), most_slots=OBJECT_SLOTS)
    yield one
    one.stop()


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 40, 30, generator=torch.Generator().manual_seed(seed))


def shown(objects: ObjectEncoder, *seeds: int, weight: float, from_step: int = 0) -> Shown:
    references = tuple(Reference(objects.images.pixels(picture(seed))[0], {}) for seed in seeds)
    return Shown(objects, references, weight, from_step)


def plain(base: Diffuser) -> list[ImageRequest]:
    return [
        ImageRequest("a large blue ring", seed=1, num_steps=3, guidance_scale=1.0),
        ImageRequest(PROMPT, seed=2, shares=(Share(tuned(base, 1), 1.0, (999, 0)),), num_steps=6, guidance_scale=2.0),
        ImageRequest("a large red ring", seed=4, num_steps=5, solver="dpm_solver_2m", negative_prompt="blue"),
    ]


@pytest.mark.parametrize(
    ("text", "object_weight", "first", "slots"),
    [(3.0, 3.0, 0, 2), (3.0, 1.5, 2, 3), (1.0, 1.0, 0, 1), (1.0, 2.0, 0, 3)],
)
def test_an_object_has_the_bits_of_its_own_alone_and_in_a_crowd_that_has_those_of_the_base(
    base: Diffuser, engine: Engine, objects: ObjectEncoder, text: float, object_weight: float, first: int, slots: int
) -> None:
    assert objects.shares_calls
    one = shown(objects, 0, weight=object_weight, from_step=first)
    request = ImageRequest(PROMPT, seed=9, num_steps=5, guidance_scale=text, shown=one)
    assert request.slots == slots
    (alone,) = drain(engine, engine.submit([request]))
    without = drain(engine, engine.submit(plain(base)))
    rows = engine.submit([request, *plain(base)])
    encoded(rows)
    engine.step()
    crowd = drain(engine, rows)
    assert len(engine._lanes) == 1, "all in the same calls"
    assert torch.equal(crowd[0], alone)
    for image, same in zip(crowd[1:], without, strict=True):
        assert (image - same).abs().max() == 0
    (bare,) = drain(engine, engine.submit([replace(request, shown=None)]))
    assert (bare - alone).abs().max() > 1e-3


@pytest.fixture(scope="module")
def next_version(base: Diffuser, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ObjectEncoder:
    """With other tokens, so that not even their numbers could meet in a call."""
    return load_object_encoder(write_object_bundle(tiny, tmp_path_factory.mktemp("next"), tokens="patches"), base)


def test_two_versions_of_an_encoder_are_never_in_one_call(
    base: Diffuser, engine: Engine, objects: ObjectEncoder, next_version: ObjectEncoder
) -> None:
    """In the time of a promotion each row has the bits of its own version."""
    assert objects.shares_calls and next_version.shares_calls
    old, new = (
        ImageRequest(PROMPT, seed=9, num_steps=5, guidance_scale=1.0, shown=shown(one, 0, weight=1.0))
        for one in (objects, next_version)
    )
    (old_alone,), (new_alone,) = (drain(engine, engine.submit([one])) for one in (old, new))
    (plain_alone,) = drain(engine, engine.submit(plain(base)[:1]))
    in_flight = engine.submit([old])
    encoded(in_flight)
    engine.step()
    rows = engine.submit([new, *plain(base)[:1]])
    encoded(rows)
    engine.step()
    assert [row.index for row in rows] == [0, 1], "the new version waits for the old one, and nobody for it"
    crowd = drain(engine, [*in_flight, *rows])
    assert all(torch.equal(a, b) for a, b in zip(crowd, [old_alone, new_alone, plain_alone], strict=True))


@pytest.mark.parametrize(("text", "object_weight", "first"), [(3.0, 3.0, 0), (3.0, 1.5, 0), (2.0, 4.0, 2)])
def test_it_draws_what_customize_draws(
    base: Diffuser, engine: Engine, objects: ObjectEncoder, bundle: Path, text: float, object_weight: float, first: int
) -> None:
    one = shown(objects, 0, weight=object_weight, from_step=first)
    request = ImageRequest(PROMPT, seed=9, num_steps=5, guidance_scale=text, shown=one)
    (ours,) = drain(engine, engine.submit([request]))
    noise = first_noise(9, base.latent_shape)[None]
    theirs = customize.assemble(base, bundle).generate(
        [PROMPT], picture(), noise, Guidance(5, text, object_weight, first)
    )
    torch.testing.assert_close(ours, theirs[0].clamp(0, 1), rtol=0, atol=1e-4)


def test_several_pictures_of_an_object_are_a_stock_pipeline_s(
    base: Diffuser, engine: Engine, objects: ObjectEncoder, bundle: Path, tiny: Path
) -> None:
    both = shown(objects, 0, 1, weight=3.0)
    request = ImageRequest(PROMPT, seed=9, num_steps=5, guidance_scale=3.0, shown=both)
    (ours,) = drain(engine, engine.submit([request]))
    assert torch.equal(drain(engine, engine.submit([request, *plain(base)]))[0], ours)
    pipe = StableDiffusionPipeline.from_pretrained(str(tiny / "pipeline"), safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    folder = {"weight_name": object_adapter.FILE, "image_encoder_folder": object_condition.FOLDER}
    pipe.load_ip_adapter(str(bundle), subfolder="", **folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPT,
        ip_adapter_image_embeds=[torch.cat([torch.zeros_like(both.seen), both.seen])],
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(9),
        output_type="pt",
    ).images[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_an_object_may_come_into_a_picture_and_be_steered_at_once(
    base: Diffuser, objects: ObjectEncoder, tmp_path: Path
) -> None:
    controlnet = load_controlnet(write_controlnet(base, tmp_path), base)
    engine = Engine(base, EngineSettings(bucket=8, queue_seconds=1000), controlnet=controlnet, most_slots=OBJECT_SLOTS)
    scene, hole = picture(5)[0, :, :1, :1].expand(3, 32, 32), torch.zeros(1, 32, 32)
    hole[..., 16:] = 1
    request = ImageRequest(
        PROMPT,
        seed=9,
        num_steps=5,
        guidance_scale=3.0,
        shown=shown(objects, 0, weight=1.5),
        upload=Upload(scene, hole, 0.8, ""),
        control=Control(picture(6)[0, :, :32, :1].expand(3, 32, 32), 1.0, ""),
    )
    (alone,) = drain(engine, engine.submit([request]))
    less = [replace(request, **{part: None}) for part in ("shown", "upload", "control")]
    drawn = drain(engine, engine.submit([*less, request, *plain(base)[:1]]))
    engine.stop()
    assert torch.equal(drawn[3], alone)
    assert all((image - alone).abs().max() > 1e-3 for image in drawn[:3]), "each has its say"


def halves(first: int) -> torch.Tensor:
    """The first reference on one half of the picture, the second on the other."""
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    return torch.stack([left, 1 - left] if first == 0 else [1 - left, left])


def test_objects_in_regions_are_customize_s_and_keep_their_bits_beside_other_regions(
    base: Diffuser, engine: Engine, objects: ObjectEncoder, bundle: Path
) -> None:
    both = replace(shown(objects, 0, 1, weight=3.0), regions=halves(0))
    request = ImageRequest(PROMPT, seed=9, num_steps=5, guidance_scale=3.0, shown=both)
    (ours,) = drain(engine, engine.submit([request]))
    noise = first_noise(9, base.latent_shape)[None]
    theirs = customize.assemble(base, bundle).generate(
        [PROMPT], [picture(0), picture(1)], noise, Guidance(5, 3.0, 3.0), halves(0)
    )
    torch.testing.assert_close(ours, theirs[0].clamp(0, 1), rtol=0, atol=1e-4)
    turned = replace(request, shown=replace(both, regions=halves(1)))
    apart = replace(request, shown=replace(both, weight=1.5), guidance_scale=3.0)
    lanes = len(engine._lanes)
    crowd = drain(engine, engine.submit([turned, request, apart]))
    assert len(engine._lanes) == lanes, "whatever their regions, in the same calls"
    assert torch.equal(crowd[1], ours) and not torch.equal(crowd[0], ours)


def test_a_tuned_unet_draws_objects_alone_in_calls_of_its_own(
    base: Diffuser, tiny: Path, tmp_path: Path, engine: Engine
) -> None:
    folder = write_object_bundle(tiny, tmp_path, tokens="patches", unet={})
    other = load_object_encoder(folder, base)
    assert not other.shares_calls and other.description["object"]["tokens"] == "patches"
    one = shown(other, 0, weight=2.0)
    request = ImageRequest(PROMPT, seed=9, num_steps=4, guidance_scale=2.0, shown=one)
    without = drain(engine, engine.submit(plain(base)))
    drawn = drain(engine, engine.submit([request, *plain(base)]))
    assert all(torch.equal(a, b) for a, b in zip(drawn[1:], without, strict=True))
    noise = first_noise(9, base.latent_shape)[None]
    theirs = customize.assemble(base, folder).generate([PROMPT], picture(), noise, Guidance(4, 2.0, 2.0))
    torch.testing.assert_close(drawn[0], theirs[0].clamp(0, 1), rtol=0, atol=1e-4)


def test_in_bfloat16_an_object_is_as_strict(tiny: Path, bundle: Path) -> None:
    rounded = load(Model(path=str(tiny / "pipeline"), precision="bf16"))
    objects = load_object_encoder(bundle, rounded)
    rounded.hold_rounded()
    objects.hold_rounded(rounded)
    engine = Engine(rounded, EngineSettings(bucket=8, queue_seconds=1000), most_slots=OBJECT_SLOTS)
    one = ImageRequest(PROMPT, seed=9, num_steps=4, guidance_scale=3.0, shown=shown(objects, 0, weight=1.5))
    (alone,), without = drain(engine, engine.submit([one])), drain(engine, engine.submit(plain(rounded)))
    crowd = drain(engine, engine.submit([one, *plain(rounded)]))
    engine.stop()
    assert all(torch.equal(a, b) for a, b in zip(crowd, [alone, *without], strict=True))
    assert objects.unet.conv_in.weight is rounded.unet.conv_in.weight, "the base's weights are in memory once"


@pytest.mark.parametrize("unet", ["frozen", {}, {"method": "lora", "rank": 2}])
def test_beside_a_base_that_is_rounded_already_it_draws_the_same_bits(tiny: Path, tmp_path: Path, unet: object) -> None:
    """So does a version that is promoted while others are served."""
    model = Model(path=str(tiny / "pipeline"), precision="bf16")
    folder = write_object_bundle(tiny, tmp_path, unet=unet)
    drawn = []
    for rounded_first in (False, True):
        base = load(model)
        if rounded_first:
            objects = object_encoders(model, base.hold_rounded(), str(folder), None).table[ON_THE_SHELF]
        else:
            objects = load_object_encoder(folder, base)
            base.hold_rounded()
            objects.hold_rounded(base)
        assert (objects.unet.conv_in.weight is base.unet.conv_in.weight) == (unet == "frozen")
        engine = Engine(base, EngineSettings(bucket=8, queue_seconds=1000), most_slots=OBJECT_SLOTS)
        one = ImageRequest(PROMPT, seed=9, num_steps=4, guidance_scale=3.0, shown=shown(objects, 0, weight=1.5))
        drawn += drain(engine, engine.submit([one]))
        engine.stop()
    assert torch.equal(*drawn)


def test_what_the_machine_lacks_is_no_refusal(base: Diffuser, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: Path) -> None:
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setattr(object_adapter, "read", read)
    with pytest.raises(torch.OutOfMemoryError):
        load_object_encoder(bundle, base)


def test_other_bundles_and_other_bases_are_refused(base: Diffuser, bundle: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderRefused, match="object_encoder = .*: a text encoder; those are served by"):
        load_object_encoder(write_tuned_bundle(tiny, base, tmp_path, 1), base)
    other = copy.deepcopy(base.unet)
    other.conv_in.weight.data.add_(0.1)
    with pytest.raises(EncoderRefused, match="made for the unet of .*; this base has another"):
        load_object_encoder(bundle, replace(base, unet=other))
