"""The engine: any rows share a step, no row can tell, and the arithmetic is that of the training rollout."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from craftor.decode import decode
from craftor.denoise import State
from craftor.diffuser import Diffuser, load
from craftor.mixture import sample_mixture
from craftor.recipe import Model
from craftor.rollout import Rollout
from craftor.serving import buckets
from craftor.serving.admission import Rejected
from craftor.serving.control import Control, load_controlnet
from craftor.serving.engine import Engine
from craftor.serving.settings import EngineSettings
from craftor.serving.upload import Upload
from craftor.serving.work import Cancelled, ImageRequest, Share, first_noise
from serving_parts import drain, encoded, tuned, write_controlnet

PROMPT = "a small red star"


class Recorded:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, str]] = []
        self.ends: list[str] = []

    def stepped(self, slots: int, bucket: int, seconds: float, overhead: float, reason: str) -> None:
        self.steps.append((slots, bucket, reason))

    def started(self, waited: float) -> None:
        assert waited >= 0

    def ended(self, outcome: str, seconds: float) -> None:
        self.ends.append(outcome)


@pytest.fixture(scope="module")
def base(tiny: Path) -> Diffuser:
    return load(Model(path=str(tiny / "pipeline")))


@pytest.fixture(scope="module")
def strict(base: Diffuser) -> Iterator[Engine]:
    engine = Engine(base, EngineSettings(bucket=8, queue_seconds=1000))
    yield engine
    engine.stop()


def engine_of(base: Diffuser, observer: Recorded | None = None, **settings: object) -> Engine:
    return Engine(base, EngineSettings(**{"bucket": 4, "queue_seconds": 1000.0, **settings}), observer)


def parts_of(diffuser: Diffuser) -> dict:
    return {
        "unet": diffuser.unet,
        "vae": diffuser.vae,
        "tokenizer": diffuser.tokenizer,
        "text_encoder": diffuser.text_encoder,
        "scheduler": DDIMScheduler.from_config(diffuser.scheduler.config),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.mark.parametrize("model", ["pipeline", "sd2", "sdxl", "micro:base"])
def test_the_base_alone_makes_the_pipelines_own_image(tiny: Path, model: str) -> None:
    path = model if ":" in model else str(tiny / model)
    diffuser = load(Model(path=path))
    engine = engine_of(diffuser)
    request = ImageRequest(PROMPT, seed=11, negative_prompt="blue", num_steps=5, guidance_scale=4.0)
    (ours,) = drain(engine, engine.submit([request]))
    engine.stop()

    if model == "sdxl":
        parts = {name: part for name, part in parts_of(diffuser).items() if "safety" not in name}
        second = {"text_encoder_2": diffuser.encoders["text_encoder_2"], "tokenizer_2": diffuser.tokenizer}
        pipe = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts_of(diffuser))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPT,
        negative_prompt="blue",
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
        output_type="pt",
    ).images[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2m"])
def test_the_arithmetic_is_the_rollouts_bit_for_bit(base: Diffuser, solver: str) -> None:
    """Two slots are what a guided rollout of one sample calls the UNet with."""
    engine = engine_of(base, bucket=2)
    shares = (Share(tuned(base, 1), 0.6, (999, 500)), Share(tuned(base, 2), 0.3, (600, 0)))
    request = ImageRequest(PROMPT, seed=5, shares=shares, num_steps=6, guidance_scale=3.0, solver=solver)
    (ours,) = drain(engine, engine.submit([request]))
    guided = base.guided(Rollout(num_steps=6, guidance_scale=3.0, solver=solver))
    prompt, members = engine.embeddings.prompts(request, guided.schedule)
    engine.stop()
    assert [member.steps for member in members] == [range(0, 3), range(3, 6)]
    noise = State(first_noise(5, base.latent_shape)[None])
    with torch.inference_mode():
        latents = sample_mixture(guided, noise, prompt, members, range(6)).latents
        assert torch.equal(ours, decode(base.vae, latents)[0].clamp(0, 1))


def various(base: Diffuser) -> list[ImageRequest]:
    one, two = tuned(base, 1), tuned(base, 2)
    return [
        ImageRequest("a large blue ring", seed=1, num_steps=3, guidance_scale=1.0),
        ImageRequest(PROMPT, seed=2, shares=(Share(one, 1.0, (999, 0)),), num_steps=9, guidance_scale=2.0),
        ImageRequest("a small blue star", seed=3, shares=(Share(two, 0.5, (500, 0)),), num_steps=4),
        ImageRequest("a large red ring", seed=4, num_steps=6, solver="dpm_solver_2m", negative_prompt="blue"),
        ImageRequest(PROMPT, seed=5, num_steps=2, guidance_scale=1.0),
        ImageRequest("a large red star", seed=6, num_steps=5, guidance_scale=9.0),
    ]


def test_a_request_has_the_same_bits_alone_and_in_a_crowd(base: Diffuser, strict: Engine) -> None:
    shares = (Share(tuned(base, 1), 0.4, (800, 0)), Share(tuned(base, 2), 0.4, (999, 300)))
    request = ImageRequest(PROMPT, seed=7, shares=shares, num_steps=7, guidance_scale=5.0)
    (alone,) = drain(strict, strict.submit([request]))
    for arrives_after in (0, 2):
        crowd = strict.submit(various(base))
        encoded(crowd)
        for _ in range(arrives_after):
            strict.step()
        mine = strict.submit([request])
        later = strict.submit(various(base)[:3])
        images = drain(strict, [*mine, *crowd, *later])
        assert torch.equal(images[0], alone)
    assert not torch.equal(drain(strict, strict.submit([ImageRequest(PROMPT, seed=7, num_steps=7)]))[0], alone)


def test_in_bfloat16_bits_are_as_strict_and_pictures_are_decoded_in_it(tiny: Path) -> None:
    rounded = load(Model(path=str(tiny / "pipeline"), precision="bf16")).hold_rounded()
    engine = engine_of(rounded, bucket=8)
    request = ImageRequest(PROMPT, seed=7, shares=(Share(tuned(rounded, 1), 0.4, (800, 0)),), num_steps=5)
    rows = engine.submit([request])
    (alone,) = drain(engine, rows)
    assert torch.equal(drain(engine, engine.submit([*various(rounded), request]))[-1], alone)
    engine.stop()
    exact = decode(rounded.vae, rows[0].latents[None])[0].clamp(0, 1)
    assert alone.dtype == torch.float32 and not torch.equal(alone, exact)
    torch.testing.assert_close(alone, exact, rtol=0, atol=0.03)


def compile_by(backend: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of inductor, which takes minutes and a C++ compiler."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
    torch.compiler.reset()


def test_all_is_compiled_before_anybody_waits_and_is_as_strict(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without a C++ compiler: what is traced is run as it is."""
    graphs = []

    def traced(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    compile_by(traced, monkeypatch)
    base = load(Model(path=str(tiny / "pipeline"), precision="bf16", compile=True)).hold_rounded()
    engine = engine_of(base, bucket=8)
    side = base.latent_shape[1] * base.pixels_per_latent
    engine.prepare([(side, side), (side, 2 * side)])
    assert len(graphs) == 2, "one for each shape"
    requests = various(base)
    wide = replace(requests[0], size=(side, 2 * side))
    crowd = drain(engine, engine.submit([*requests, wide]))
    for index in (0, 2):
        (alone,) = drain(engine, engine.submit([requests[index]]))
        assert torch.equal(alone, crowd[index])
    assert len(graphs) == 2, "and no request waited for another"
    engine.stop()
    torch.compiler.reset()
    plain = engine_of(load(Model(path=str(tiny / "pipeline"), precision="bf16")).hold_rounded(), bucket=8)
    torch.testing.assert_close(drain(plain, plain.submit(requests[:1]))[0], crowd[0], rtol=0, atol=0.02)
    plain.stop()


def test_code_that_cannot_be_compiled_is_told_with_its_remedy(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a start was killed: the half of a library that it left ended every later one, with a page of frames."""

    def half_written(graph: torch.fx.GraphModule, _: object) -> Callable:
        raise ImportError("cywlqby.main.so: file too short")

    compile_by(half_written, monkeypatch)
    base = load(Model(path=str(tiny / "pipeline"), precision="bf16", compile=True)).hold_rounded()
    with pytest.raises(RuntimeError, match=r"model\.compile = true: .*file too short.*TORCHINDUCTOR_CACHE_DIR"):
        engine_of(base, bucket=8)
    torch.compiler.reset()


def test_weight_zero_and_the_base_are_one(base: Diffuser, strict: Engine) -> None:
    plain = ImageRequest(PROMPT, seed=3, num_steps=4)
    nothing = ImageRequest(PROMPT, seed=3, num_steps=4, shares=(Share(tuned(base, 1), 0.0, (999, 0)),))
    outside = ImageRequest(PROMPT, seed=3, num_steps=4, shares=(Share(tuned(base, 1), 1.0, (10, 0)),))
    images = drain(strict, strict.submit([plain, nothing, outside]))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_rows_join_and_leave_at_every_step_and_guidance_one_takes_one_slot(base: Diffuser) -> None:
    seen = Recorded()
    engine = engine_of(base, seen)
    requests = [ImageRequest(PROMPT, seed=i, num_steps=steps, guidance_scale=1.0) for i, steps in enumerate((1, 2, 3))]
    rows = engine.submit([*requests, ImageRequest(PROMPT, seed=9, num_steps=2, guidance_scale=2.0)])
    encoded(rows)
    drain(engine, rows)
    engine.stop()
    # Three rows of one slot leave one free, too few for the guided one; it joins as the first leaves.
    assert [slots for slots, _, _ in seen.steps] == [3, 4, 3]
    assert [reason for _, _, reason in seen.steps] == ["misfit_or_encoding", "full", "nothing_waiting"]
    assert {bucket for _, bucket, _ in seen.steps} == {4} and seen.ends == ["completed"] * 4


def test_a_cancelled_row_frees_its_slots_at_the_next_step(base: Diffuser) -> None:
    seen = Recorded()
    engine = engine_of(base, seen, bucket=2)
    long, waiting = engine.submit([ImageRequest(PROMPT, seed=i, num_steps=50) for i in range(2)])
    encoded([long, waiting])
    engine.step()
    assert long.index == 1 and waiting.index == 0
    assert engine.cancel([long]) == 1 and engine.cancel([long]) == 0
    engine.step()
    assert long.index == 1 and waiting.index == 1
    with pytest.raises(Cancelled):
        long.done.result()
    engine.cancel([waiting])
    assert engine.step() is False and engine.load().waiting == 0 and engine.load().running == 0
    engine.stop()
    assert seen.ends == ["cancelled", "cancelled"]


def test_a_sweep_encodes_each_prompt_once_per_encoder(base: Diffuser, strict: Engine) -> None:
    encoder, prompt = tuned(base, 77), "a large blue star of its own"
    before = strict.embeddings.misses
    sweep = [ImageRequest(prompt, seed=1, shares=(Share(encoder, w / 4, (999, 0)),), num_steps=2) for w in range(1, 5)]
    drain(strict, strict.submit(sweep))
    assert strict.embeddings.misses - before <= 4, "the prompt and the empty one, by the base and by the encoder"


def test_previews_are_pictures_on_the_way(base: Diffuser, strict: Engine) -> None:
    shown: list[tuple[int, torch.Size]] = []
    request = ImageRequest(PROMPT, seed=1, num_steps=8, previews=3)
    rows = strict.submit([request], listeners=[lambda index, image: shown.append((index, image.shape))])
    drain(strict, rows)
    side = base.latent_shape[1]
    assert shown == [(index, (3, side, side)) for index in (2, 4, 6)]


def test_fast_mode_takes_the_smallest_bucket_and_agrees_up_to_rounding(base: Diffuser, strict: Engine) -> None:
    seen = Recorded()
    engine = engine_of(base, seen, mode="fast", bucket=8)
    (fast,) = drain(engine, engine.submit([ImageRequest(PROMPT, seed=2, num_steps=3)]))
    engine.stop()
    assert {bucket for _, bucket, _ in seen.steps} == {2}
    (exact,) = drain(strict, strict.submit([ImageRequest(PROMPT, seed=2, num_steps=3)]))
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-4)


def test_shapes_take_turns(base: Diffuser) -> None:
    engine = engine_of(base, bucket=2)
    small, large = engine.submit(
        [ImageRequest(PROMPT, seed=1, num_steps=4), ImageRequest(PROMPT, seed=1, num_steps=4, size=(48, 32))]
    )
    encoded([small, large])
    engine.step()
    engine.step()
    assert small.index == large.index == 1
    images = drain(engine, [small, large])
    engine.stop()
    assert [image.shape for image in images] == [(3, 32, 32), (3, 48, 32)]


def test_too_much_work_and_deadlines_are_refused_at_once_late_rows_in_the_queue(base: Diffuser) -> None:
    engine = engine_of(base, queue_seconds=0.001)
    rows = engine.submit([ImageRequest(PROMPT, seed=1, num_steps=20)])
    with pytest.raises(Rejected, match="is waiting and this adds") as refused:
        engine.submit([ImageRequest(PROMPT, seed=2, num_steps=900)])
    assert refused.value.reason == "queue_full" and refused.value.retry_after >= 1
    drain(engine, rows)
    with pytest.raises(Rejected, match="but the deadline is in 0.0 s"):
        engine.submit([ImageRequest(PROMPT, seed=2, num_steps=900)], deadline=1e-6)
    (late,) = engine.submit([ImageRequest(PROMPT, seed=2, num_steps=1)], deadline=30.0)
    encoded([late])
    late.deadline = 0.0
    engine.step()
    with pytest.raises(Rejected, match="the deadline passed"):
        late.done.result()
    engine.stop()


def test_a_deadline_counts_what_runs_and_what_waits(base: Diffuser) -> None:
    """Slots for two: the third row begins when the shorter of the two before it ends, in the steps' measured time."""
    engine = engine_of(base, bucket=2)
    plain = {"guidance_scale": 1.0, "prompt": PROMPT}
    before = engine.submit([ImageRequest(seed=i, num_steps=steps, **plain) for i, steps in enumerate((10, 4))])
    encoded(before)
    engine.step()
    (lane,) = engine._lanes
    step = lane.seconds[2]
    with pytest.raises(Rejected, match="the deadline is in") as refused:
        engine.submit([ImageRequest(seed=3, num_steps=5, **plain)], deadline=7.9 * step)
    assert refused.value.reason == "deadline", "3 steps until a slot is free, and 5 of its own"
    third = engine.submit([ImageRequest(seed=3, num_steps=5, **plain)], deadline=60.0)
    with pytest.raises(Rejected, match="the deadline is in"):
        engine.submit([ImageRequest(seed=4, num_steps=1, guidance_scale=2.0, prompt=PROMPT)], deadline=9.9 * step)
    engine.cancel([*before, *third])
    engine.stop()


def test_the_loop_runs_by_itself_and_a_failure_leaves_nobody_waiting(base: Diffuser, monkeypatch) -> None:  # noqa: ANN001
    engine = engine_of(base).start()
    image = engine.submit([ImageRequest(PROMPT, seed=1, num_steps=3)])[0].done.result(timeout=30)
    assert image.shape == (3, 32, 32) and image.min() >= 0 and image.max() <= 1 and engine.alive

    def broken(*_: object) -> float:
        raise MemoryError("no memory left")

    monkeypatch.setattr("craftor.serving.engine.advance", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(Cancelled):
        engine.submit([ImageRequest(PROMPT, seed=1, num_steps=3)])[0].done.result(timeout=30)
    assert not engine.alive
    engine.stop()


def test_ladders_and_knees() -> None:
    assert buckets.ladder("strict", 12) == (12,) and buckets.ladder("fast", 12) == (1, 2, 4, 8, 12)
    assert buckets.smallest((1, 2, 4, 8, 12), 5) == 8
    assert buckets.knee({1: 9.0, 2: 12.0, 4: 18.0, 8: 28.0, 16: 64.0}) == 8
    assert buckets.knee({1: 1.0, 2: 2.0, 4: 4.0}) == 2


def picture(side: int = 32) -> torch.Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize(
    ("model", "strength", "masked", "solver"),
    [
        ("micro:base", 0.5, False, "ddim"),  # with a tiny autoencoder
        ("tiny", 1.0, False, "ddim"),
        ("tiny", 0.7, False, "dpm_solver_2m"),
        ("tiny", 0.8, True, "ddim"),
        ("tiny", 1.0, True, "ddim"),
    ],
)
def test_beginning_from_a_picture_is_diffusers_own(
    base: Diffuser, monkeypatch: pytest.MonkeyPatch, model: str, strength: float, masked: bool, solver: str
) -> None:
    """Image to image, and inpainting by a UNet that knows nothing of masks; but for what the autoencoder draws."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda latents, generator=None: latents.mode())
    diffuser = base if model == "tiny" else load(Model(path=model))
    side = diffuser.latent_shape[1] * diffuser.pixels_per_latent
    mask = torch.zeros(1, side, side)
    mask[:, 8:, 16:] = 1
    upload = Upload(picture(side), mask if masked else None, strength, "")
    request = ImageRequest(PROMPT, seed=4, num_steps=5, guidance_scale=4.0, solver=solver, upload=upload)
    engine = engine_of(diffuser, bucket=2)
    (ours,) = drain(engine, engine.submit([request]))
    engine.stop()
    pipe = (StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline)(**parts_of(diffuser))
    pipe.set_progress_bar_config(disable=True)
    if solver == "dpm_solver_2m":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            diffuser.scheduler.config, final_sigmas_type="sigma_min"
        )
    theirs = pipe(
        PROMPT,
        image=upload.image[None],
        strength=strength,
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(4),
        output_type="pt",
        **({"mask_image": mask[None], "height": side, "width": side} if masked else {}),
    ).images[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", ["pipeline", "sdxl"])
def test_a_controlnet_steers_as_in_diffusers(tiny: Path, tmp_path: Path, model: str) -> None:
    diffuser = load(Model(path=str(tiny / model)))
    controlnet = load_controlnet(write_controlnet(diffuser, tmp_path / "controlnet"), diffuser)
    engine = Engine(diffuser, EngineSettings(bucket=2, queue_seconds=1000), controlnet=controlnet)
    steered = ImageRequest(PROMPT, seed=4, num_steps=5, guidance_scale=4.0, control=Control(picture(), 0.7, ""))
    ours, plain = (drain(engine, engine.submit([one]))[0] for one in (steered, replace(steered, control=None)))
    engine.stop()
    assert (ours - plain).abs().max() > 1e-2
    parts = parts_of(diffuser) | {"controlnet": controlnet.module}
    if model == "sdxl":
        parts = {name: part for name, part in parts.items() if "safety" not in name}
        parts |= {"text_encoder_2": diffuser.encoders["text_encoder_2"], "tokenizer_2": diffuser.tokenizer}
        pipe = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPT,
        image=picture()[None],
        controlnet_conditioning_scale=0.7,
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(4),
        output_type="pt",
    ).images[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-4)


def test_steered_rows_and_others_share_calls_and_cannot_tell(base: Diffuser, strict: Engine, tmp_path: Path) -> None:
    controlnet = load_controlnet(write_controlnet(base, tmp_path / "controlnet"), base)
    engine = Engine(base, EngineSettings(bucket=8, queue_seconds=1000), controlnet=controlnet)
    share = (Share(tuned(base, 1), 1.0, (999, 500)),)
    steered = ImageRequest(PROMPT, seed=4, num_steps=5, shares=share, control=Control(picture(), 1.0, ""))
    (alone,) = drain(engine, engine.submit([steered]))
    others = various(base)
    crowd = drain(engine, engine.submit([steered, *others]))
    engine.stop()
    assert torch.equal(crowd[0], alone)
    for image, other in zip(crowd[1:], others, strict=True):
        assert torch.equal(image, drain(strict, strict.submit([other]))[0]), "as on a server without a ControlNet"


def test_other_controlnets_are_refused(base: Diffuser, tiny: Path, tmp_path: Path) -> None:
    other = write_controlnet(load(Model(path=str(tiny / "sdxl"))), tmp_path / "sdxl")
    with pytest.raises(ValueError, match="has cross_attention_dim = 32, the model's UNet 16"):
        load_controlnet(other, base)
    with pytest.raises(ValueError, match="controlnet = 'nobody/nothing': not a ControlNet in safetensors"):
        load_controlnet("nobody/nothing", base)


def test_inpainting_keeps_what_the_mask_leaves_and_has_the_same_bits_in_a_crowd(base: Diffuser, strict: Engine) -> None:
    mask = torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1
    upload = Upload(picture(), mask, 0.8, "")
    request = ImageRequest(PROMPT, seed=4, num_steps=5, upload=upload)
    rows = strict.submit([request])
    (alone,) = drain(strict, rows)
    kept = rows[0].kept
    assert kept is not None and rows[0].taken == 4
    side = kept.latents.shape[-1] // 2
    assert torch.equal(rows[0].latents[..., :side], kept.latents[..., :side])
    assert not torch.equal(rows[0].latents[..., side:], kept.latents[..., side:])
    assert torch.equal(drain(strict, strict.submit([request, *various(base)]))[0], alone)
