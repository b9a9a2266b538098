"""What tests of serving share: tuned encoders made by noise, an engine driven by hand, bundles on disk."""

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
import uvicorn
from diffusers import ControlNetModel

from conftest import write_tiny_recipe
from craftor import recipe, registry
from craftor.diffuser import Diffuser
from craftor.encoders import Encoder
from craftor.serving.api import build_app
from craftor.serving.engine import Engine
from craftor.serving.service import Service
from craftor.serving.work import Row
from craftor.tasks.object_encoder import ObjectEncoderTask
from waiting import wait_for


def tuned_module(base: Diffuser, seed: int, strength: float = 0.3) -> torch.nn.Module:
    """The base's text encoder with noise on its weights."""
    module = copy.deepcopy(base.text_encoder)
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += strength * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=g)
    return module


def tuned(base: Diffuser, seed: int, window: tuple[int, int] = (999, 0)) -> Encoder:
    modules = {"text_encoder": tuned_module(base, seed)}
    return Encoder(f"tuned{seed}", None, f"/{seed}", f"{seed:064x}", None, modules, window, {})


def write_tuned_bundle(tiny: Path, base: Diffuser, folder: Path, seed: int) -> Path:
    """A bundle as training writes it; its window is the last 2 of 4 steps."""
    trained = folder / f"trained{seed}"
    tuned_module(base, seed).save_pretrained(trained / "text_encoder", safe_serialization=True)
    settings = recipe.load(write_tiny_recipe(tiny, folder), {"name": f"tuned{seed}"})
    return registry.write_bundle(settings, base, trained, folder / f"tuned{seed}")


def write_object_bundle(tiny: Path, folder: Path, tokens: str = "pooled", unet: object = "frozen") -> Path:
    """A bundle of an object encoder with random weights, so that an object has a say."""
    given = {"kind": "object_encoder", "domain": "toys", "image_encoder": f"{tiny}/clip"}
    settings = recipe.Recipe.model_validate(
        {
            "name": f"{tokens}-objects",
            "model": {"path": f"{tiny}/pipeline"},
            "data": {"path": str(folder)},
            "task": {**given, "tokens": tokens, "unet": unet},
            "optimizer": {"lr": 1e-2},
            "run": {"num_steps": 1, "batch_size": 4},
        }
    )
    task, g = ObjectEncoderTask(settings), torch.Generator().manual_seed(3)
    for parameter in task.module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    task.save(folder / "saved")
    return registry.write_bundle(settings, task.diffuser, folder / "saved", folder / "objects")


def write_controlnet(diffuser: Diffuser, folder: Path) -> str:
    """One with weights of its own, on disk."""
    torch.manual_seed(3)
    module = ControlNetModel.from_unet(diffuser.unet, conditioning_embedding_out_channels=(8, 8, 8))
    for parameter in module.parameters():  # what starts at zero would hide the control
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return str(folder)


def drain(engine: Engine, rows: Sequence[Row], *, seconds: float = 60) -> list[torch.Tensor]:
    """Step an engine that was not started until these rows are done; their images."""
    until = time.monotonic() + seconds
    while not all(row.done.done() for row in rows):
        assert time.monotonic() < until, "rows do not finish"
        if not engine.step():
            time.sleep(0.001)
    return [row.done.result() for row in rows]


def encoded(rows: Sequence[Row]) -> None:
    """Wait until the prompts of these rows are encoded."""
    wait_for(lambda: all(row.encoded for row in rows))


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """The service behind uvicorn in a thread; its URL."""
    server = uvicorn.Server(uvicorn.Config(build_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def replicas() -> list[psutil.Process]:
    """Ray Serve's replicas of a local cluster that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith("ray::ServeReplica:craftor"):
                found.append(process)
    return found
