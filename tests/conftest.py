"""Tiny random models with the real classes, saved in the real layout; one Ray cluster for all tests that need one."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray Train asks its workers every two seconds whether they have ended: many runs here take no longer.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# A process that reads rows imports for two seconds: those of one test read the next one's.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
os.environ.setdefault("RAY_num_workers_soft_limit", "12")
torch.set_num_threads(1)
gc.set_threshold(10_000)  # as `craftor` itself
# Examples are not timed: tests beside these have the cores too.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes first: they take longest, and the others fill what pytest-xdist has left."""
    long = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long)


def save_tiny_pipeline(folder: Path, family: str = "sd1") -> Path:
    """A pipeline of some 30,000 random weights, 32-pixel images and 8x8x4 latents, of Stable Diffusion 1, 2 or XL.

    `sd1` predicts noise; `sd2` velocity, with an OpenCLIP-like encoder; `sdxl` reads two encoders and image sizes.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from craftor_micro.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()

    def text_config(hidden_act: str = "quick_gelu") -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=12,
            hidden_act=hidden_act,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    ddim = {**noise, "clip_sample": False, "set_alpha_to_one": False}
    micro_conditioning = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12 + 6 * 4,
        "use_linear_projection": True,
    }
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
        ),
        "text_encoder": CLIPTextModel(text_config("gelu" if family == "sd2" else "quick_gelu")),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32 if family == "sdxl" else 16,
            attention_head_dim=2,
            norm_num_groups=4,
            **(micro_conditioning if family == "sdxl" else {}),
        ),
    }
    if family == "sdxl":
        second = {"text_encoder_2": CLIPTextModelWithProjection(text_config("gelu")), "tokenizer_2": tokenizer}
        pipeline = StableDiffusionXLPipeline(**parts, **second, scheduler=EulerDiscreteScheduler(**noise))
    else:
        prediction = "v_prediction" if family == "sd2" else "epsilon"
        pipeline = StableDiffusionPipeline(
            **parts,
            scheduler=DDIMScheduler(**ddim, prediction_type=prediction),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_clip(folder: Path, seed: int) -> Path:
    """A random `CLIPModel` for 32-pixel images with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    from craftor_micro.tokenizer import build_tokenizer

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pipeline/`, `sd2/`, `sdxl/`, `clip/`, `pick/` and `prompts.txt`."""
    root = tmp_path_factory.mktemp("tiny")
    save_tiny_pipeline(root / "pipeline")
    save_tiny_pipeline(root / "sd2", "sd2")
    save_tiny_pipeline(root / "sdxl", "sdxl")
    save_tiny_clip(root / "clip", seed=1)
    save_tiny_clip(root / "pick", seed=2)
    words = [
        f"a {size} {colour} {shape}"
        for size in ("small", "large")
        for colour in ("red", "blue")
        for shape in ("star", "ring")
    ]
    (root / "prompts.txt").write_text("\n".join([*words, words[0], ""]) + "\n")
    return root


@pytest.fixture
def tiny_recipe(tiny: Path, tmp_path: Path) -> Path:
    return write_tiny_recipe(tiny, tmp_path)


def write_tiny_recipe(tiny: Path, folder: Path) -> Path:
    """A complete reward-tuning recipe on the tiny models: 4 denoising steps, the last 2 with gradient.

    It trains in the test's own process: on two cores a process that imports all of this costs more than its run.
    """
    path = folder / "tiny.toml"
    path.write_text(
        f"""
name = "tiny"
seed = 7
model = {{ path = "{tiny}/pipeline" }}
data = {{ path = "{tiny}/prompts.txt" }}
optimizer = {{ lr = 1e-3, warmup_steps = 2, cosine_from = 0.5 }}
run = {{ num_steps = 24, batch_size = 4, checkpoint_every = 4 }}
workers = {{ num = 0, threads = 1 }}
register = {{ name = "tiny", aliases = ["candidate"] }}

[task]
kind = "reward_tuning"
rollout = {{ num_steps = 4, guidance_scale = 3.0 }}
window = {{ last = 2 }}
[task.rewards]
clip = {{ kind = "clip_score", weights = "{tiny}/clip", weight = 10.0 }}
pick = {{ kind = "pick_score", weights = "{tiny}/pick", weight = 0.5 }}
"""
    )
    return path


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for the session; starting one takes some ten seconds."""
    from craftor.cluster import ray_session

    with ray_session(num_workers=4):
        yield


@pytest.fixture(scope="session")
def undisturbed(tiny: Path, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `watched_runs.SHORT` that nothing disturbed."""
    from watched_runs import SHORT

    return _made_once(tmp_path_factory, "undisturbed", lambda folder: _run(tiny, folder, SHORT))


@pytest.fixture(scope="session")
def undisturbed_of_two(tiny: Path, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two workers, by `watched_runs.TWO`."""
    from watched_runs import TWO, long_epochs

    return _made_once(
        tmp_path_factory, "undisturbed-of-two", lambda folder: _run(tiny, folder, TWO | long_epochs(folder))
    )


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make` makes in a folder, by the first of pytest-xdist's processes that wants it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with FileLock(f"{folder}.lock"):
        made = folder / "made"
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            made.write_text(str(make(folder)))
        return Path(made.read_text())


def _run(tiny: Path, folder: Path, changes: dict[str, Any]) -> Path:
    from craftor import job
    from craftor.recipe import load

    path = write_tiny_recipe(tiny, folder)
    return job.train(load(path, changes), path, folder / "run").run_dir
