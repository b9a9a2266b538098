"""Workloads of image requests, the servers they are put to, and open-loop arrivals: what `serve` measures with.

Servers are compared inside one process pinned to one core, without HTTP, which would add the same noise to each:
`Continuous`, the engine; `Grouped`, the procedure of Ray Serve's `@serve.batch` (take what waits, up to a size, after
10 ms; run each group of equal parameters to its end), without the hops between Ray's processes that it also costs, and
with each group answered when it is done rather than with its batch; of size 1 it is one request at a time, a FastAPI
route around a pipeline behind a lock. `Grouped` calls diffusers' own pipeline, wholly in the engine's precision, with
embeddings that are encoded per request, in a batch where they can be.
"""

import copy
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from craftor.diffuser import Diffuser
from craftor.embed import embed, mix
from craftor.recipe import Model
from craftor.serving.engine import Engine
from craftor.serving.work import ImageRequest, Row, Share

MODEL = Model(path="micro:base", precision="auto")
"""As models are served: a CPU with AVX-512 multiplies bfloat16 twice as fast, full calls above all."""
COMPILED = MODEL.model_copy(update={"compile": True})
"""What the engine runs: its calls have one size, so that compiling takes half a minute, once."""
SUBJECTS = (
    "a small red star",
    "a large blue ring",
    "a green square",
    "a large yellow circle on black",
    "two cyan stars",
)


@dataclass(frozen=True)
class Ask:
    """One request of a workload: when it comes, and when its client hangs up, in units of the workload's horizon."""

    request: ImageRequest
    burst: float = 0.0
    hangs_up: float | None = None


def workload(name: str, number: int, seed: int, encoders: Sequence[Share]) -> list[Ask]:
    """w1 equal parameters; w2 mixed steps; w3 + guidance; w4 + random mixtures; w5 + 20 % cancels; w6: w4 in bursts."""
    drawn = np.random.default_rng(seed)
    asks = []
    for i in range(number):
        steps = 20 if name == "w1" else int(drawn.choice([8, 20, 50]))
        guidance = 5.0 if name in ("w1", "w2") else float(drawn.choice([1.0, 5.0, 7.5]))
        shares: tuple[Share, ...] = ()
        if name in ("w4", "w5", "w6"):
            weights = drawn.dirichlet(np.ones(len(encoders) + 1))[1:]
            shares = tuple(Share(e.encoder, float(w), e.window) for e, w in zip(encoders, weights, strict=True))
        request = ImageRequest(
            str(drawn.choice(SUBJECTS)) + f" {drawn.choice(['crisp', 'soft'])}",
            seed=seed * 10_000 + i,
            shares=shares,
            num_steps=steps,
            guidance_scale=guidance,
        )
        hangs_up = float(drawn.uniform()) if name == "w5" and drawn.uniform() < 0.2 else None
        asks.append(Ask(request, 0.5 if name == "w6" and i >= number // 2 else 0.0, hangs_up))
    return asks


class Server(Protocol):
    """Takes a request; the future is its image."""

    name: str

    def submit(self, request: ImageRequest) -> Future: ...
    def began(self, future: Future) -> float:
        """When its first denoising step did, by `time.monotonic()`."""

    def cancel(self, future: Future) -> None: ...
    def stop(self) -> None: ...


class Continuous:
    """The engine."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self._rows: dict[Future, Row] = {}

    def submit(self, request: ImageRequest) -> Future:
        (row,) = self.engine.submit([request])
        self._rows[row.done] = row
        return row.done

    def began(self, future: Future) -> float:
        return self._rows[future].started or math.nan

    def cancel(self, future: Future) -> None:
        self.engine.cancel([self._rows[future]])

    def stop(self) -> None:
        self._rows.clear()
        self.engine.stop()


class Grouped:
    """Batches that wait for their slowest part; `size` 1 is one request at a time."""

    def __init__(self, base: Diffuser, name: str, size: int, wait: float = 0.01, compiled: bool = False) -> None:
        self.name, self._base, self._size, self._wait = name, base, size, wait
        self._pipeline = StableDiffusionPipeline(
            vae=copy.deepcopy(base.vae),
            text_encoder=copy.deepcopy(base.text_encoder),
            tokenizer=base.tokenizer,
            unet=copy.deepcopy(base.unet),
            scheduler=DDIMScheduler.from_config(base.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(base.precision)
        self._pipeline.set_progress_bar_config(disable=True)
        if compiled:
            self._pipeline.unet.compile(dynamic=False)
        self._queue: queue.SimpleQueue[tuple[ImageRequest, Future] | None] = queue.SimpleQueue()
        self._began: dict[Future, float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest) -> Future:
        done: Future = Future()
        self._queue.put((request, done))
        return done

    def began(self, future: Future) -> float:
        return self._began[future]

    def cancel(self, future: Future) -> None:
        """What has not begun is dropped; what has goes on, as in `serve.batch`."""
        future.cancel()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch._dynamo.config.recompile_limit = 64  # a setting of each thread
        while (first := self._queue.get()) is not None:
            batch, until = [first], time.monotonic() + self._wait
            while len(batch) < self._size:
                try:
                    item = self._queue.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if item is None:
                    self._queue.put(None)
                    break
                batch.append(item)
            groups: dict[tuple, list[tuple[ImageRequest, Future]]] = {}
            for request, done in batch:
                if done.set_running_or_notify_cancel():
                    mixture = tuple((share.encoder.sha256, share.weight) for share in request.shares)
                    groups.setdefault((request.num_steps, request.guidance_scale, mixture), []).append((request, done))
            for group in groups.values():
                self._began |= dict.fromkeys((done for _, done in group), time.monotonic())
                for (_, done), image in zip(group, self._images([request for request, _ in group]), strict=True):
                    done.set_result(image)

    @torch.inference_mode()
    def _images(self, requests: Sequence[ImageRequest]) -> Tensor:
        first = requests[0]
        texts = [request.prompt for request in requests]
        if first.guidance_scale > 1:
            texts.append("")
        ids = self._base.tokenize(texts)
        modules = [self._base.encoders, *(share.encoder.modules for share in first.shares)]
        weights = [share.weight for share in first.shares]
        embeds = mix([embed(module, ids) for module in modules], [1 - sum(weights), *weights]).embeds
        null = embeds[len(requests) :].expand(len(requests), -1, -1) if first.guidance_scale > 1 else None
        return self._pipeline(
            prompt_embeds=embeds[: len(requests)],
            negative_prompt_embeds=null,
            num_inference_steps=first.num_steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="pt",
        ).images


@dataclass
class Outcome:
    """What one run of a workload came to."""

    rate: float
    """Images/s while requests wait."""
    latencies: np.ndarray = field(repr=False)
    """Of finished images, in order of arrival."""


def run(server: Server, asks: Sequence[Ask], *, rate: float | None, horizon: float, seed: int) -> Outcome:
    """Arrivals that do not wait for answers: Poisson at `rate` a second, or all at once (in bursts) without one.

    `horizon` is in seconds: what bursts and hanging up are parts of.
    """
    drawn = np.random.default_rng(seed)
    arrivals = np.cumsum(drawn.exponential(1 / rate, len(asks))) if rate else np.zeros(len(asks))
    arrivals = arrivals + np.array([ask.burst for ask in asks]) * horizon
    ended = np.full(len(asks), np.nan)
    futures: list[Future] = []
    timers: list[threading.Timer] = []
    start = time.monotonic()

    def note(index: int, future: Future) -> None:
        if not future.cancelled() and future.exception() is None:
            ended[index] = time.monotonic() - start

    for index, (ask, at) in enumerate(zip(asks, arrivals, strict=True)):
        if (pause := at - (time.monotonic() - start)) > 0:
            time.sleep(pause)
        future = server.submit(ask.request)
        future.add_done_callback(lambda f, index=index: note(index, f))
        futures.append(future)
        if ask.hangs_up is not None:
            timers.append(threading.Timer(ask.hangs_up * horizon, server.cancel, [future]))
            timers[-1].start()
    wait(futures)
    for timer in timers:
        timer.cancel()
    done = np.flatnonzero(~np.isnan(ended))
    began = np.array([server.began(futures[i]) - start for i in done])
    return Outcome(saturated(work(asks)[done], began, ended[done]), (ended - arrivals)[done])


def work(asks: Sequence[Ask]) -> np.ndarray:
    """Of each request: its denoising steps, twice under guidance."""
    return np.array([ask.request.num_steps * ask.request.slots for ask in asks], dtype=float)


def saturated(work: np.ndarray, began: np.ndarray, ended: np.ndarray) -> float:
    """Images/s from the start until the last request begins, so while there is always one more to take in.

    What is under way then counts by the part of its time that has passed, and an image by its work, of which the mean
    is one image: a server that runs several at once has done the short ones first by then.
    """
    last = began.max()
    part = np.clip((last - began) / (ended - began), 0, 1)
    return float((part * work).sum() / work.mean() / last)
