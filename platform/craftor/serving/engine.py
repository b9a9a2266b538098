"""Requests -> images by continuous batching: at every denoising step finished rows leave and waiting ones join.

One thread owns the UNet. Preparing prompts and decoding pictures have threads of their own. Rows are kept by latent
shape in lanes that take turns; within a lane any rows share a call (`batch`). No Ray, no HTTP.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from craftor.allocation import keep_freed_memory
from craftor.denoise import Guided
from craftor.diffuser import Diffuser
from craftor.serving import buckets
from craftor.serving.admission import Load, Rejected, admit
from craftor.serving.batch import advance, network
from craftor.serving.control import ControlNet
from craftor.serving.decoding import Decoder, previewer
from craftor.serving.embeddings import Embeddings
from craftor.serving.lanes import Lane, Lanes, Shape
from craftor.serving.settings import EngineSettings
from craftor.serving.upload import encode
from craftor.serving.work import Cancelled, EngineEnded, ImageRequest, Listener, Observer, Row, first_noise
from craftor.solver import Schedule, begun_at, schedule


class Engine:
    """Thread-safe: `submit` and `cancel` from anywhere; `start` runs the loop, or a test calls `step` itself."""

    def __init__(
        self,
        base: Diffuser,
        settings: EngineSettings,
        observer: Observer | None = None,
        controlnet: ControlNet | None = None,
        most_slots: int = 2,
    ) -> None:
        """`most_slots` is what the largest row may take of a UNet call."""
        self.base, self.settings, self.observer, self.controlnet = base, settings, observer, controlnet
        self.embeddings = Embeddings(base, settings.cached_prompts)
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
        if base.compile:
            torch._dynamo.config.recompile_limit = 64  # of sizes and buckets together; what is beyond runs as it is
            base.unet.compile(dynamic=False)  # shapes are few, and `prepare` meets them all before anybody waits
        tried = buckets.tried(settings.mode, settings.bucket, settings.max_bucket)
        self.profile = self._measure(network(base, base.latent_shape), base.latent_shape, tried)
        self.capacity = settings.bucket or buckets.knee(self.profile, most_slots)
        self.sizes = buckets.ladder(settings.mode, self.capacity)
        self._lanes = Lanes(base, {size: self.profile[size] for size in self.sizes})
        self._schedules: dict[tuple[str, int], Schedule] = {}
        self._work = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="craftor-encoder")
        self._decoder = Decoder(base, previewer(base, self._sample_latents()), self._ended)

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Measure, and so compile, the calls of these heights and widths in pixels, instead of at the first request."""
        for size in sizes:
            lane = self._lanes.open((self._lanes.shape(size), None))
            lane.seconds.update(self._measure(lane.unet, lane.key[0], self.sizes))

    # --- from any thread

    def submit(
        self,
        requests: Sequence[ImageRequest],
        *,
        client: str = "",
        deadline: float | None = None,
        listeners: Sequence[Listener | None] | None = None,
    ) -> list[Row]:
        """Take requests in, all or none; each row's `done` is a future of its image `(3, H, W)` in [0, 1].

        `deadline` is in seconds from now. Raises `Rejected` where too much work waits, or the deadline cannot be met;
        a future raises `Cancelled`, or `Rejected` where the deadline passed while the row waited.
        """
        rows = [self._row(request, client) for request in requests]
        for row, listener in zip(rows, listeners or [None] * len(rows), strict=True):
            row.listener = listener
            row.deadline = None if deadline is None else row.submitted + deadline
        with self._work:
            cost, expected = sum(row.cost for row in rows), 0.0 if deadline is None else self._lanes.done_in(rows)
            admit(self.load(), cost, bound=self.settings.queue_seconds, expected=expected, deadline=deadline)
            for row in rows:
                self._lanes.of(row.request).waiting.push(row)
        for row in rows:
            self._encoder.submit(self._encode, row).add_done_callback(partial(self._encoded, row))
        return rows

    def cancel(self, rows: Sequence[Row]) -> int:
        """Give up those that are not done; each leaves at the next step. Returns how many."""
        return self._give_up(rows, Cancelled("cancelled"))

    def cost(self, request: ImageRequest) -> float:
        """Seconds of a full engine that a request takes: steps x slots x the time of a slot."""
        slots = (request.num_steps - request.first_step) * request.slots
        return slots * self._lanes.step_seconds(request) / self.capacity

    def load(self) -> Load:
        return self._lanes.load()

    def start(self) -> "Engine":
        self._thread = threading.Thread(target=self._run, name="craftor-engine", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End all threads; rows on their way are cancelled."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join()
        self._abandon()
        self._encoder.shutdown()
        self._decoder.stop()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self._decoder.alive

    # --- the engine's own thread

    def step(self) -> bool:
        """One denoising step of the lane whose turn it is; False where no row is ready."""
        began = time.perf_counter()
        with self._work:
            lane, reason = self._next_lane()
        if lane is None:
            return False
        slots = lane.slots
        bucket = buckets.smallest(self.sizes, slots)
        seconds = advance(lane.unet, lane.running, bucket, self.controlnet)
        lane.seconds[bucket] += 0.1 * (seconds - lane.seconds[bucket])
        for row in lane.running:
            if row.remaining == 0:
                row.denoised = time.monotonic()
                self._decoder.finish(row)
            elif row.listener is not None and row.shows_preview():
                self._decoder.preview(row)
        with self._work:
            lane.running = [row for row in lane.running if row.remaining]
        if self.observer is not None:
            self.observer.stepped(slots, bucket, seconds, time.perf_counter() - began - seconds, reason)
        return True

    def _run(self) -> None:
        torch.set_num_threads(self.settings.threads)  # a setting of each thread
        try:
            while True:
                with self._work:
                    self._work.wait_for(lambda: self._stopping or any(lane.busy for lane in self._lanes))
                    if self._stopping or not self._decoder.alive:
                        return
                self.step()
        finally:
            self._abandon()  # whatever ended the loop, nobody waits for ever

    def _next_lane(self) -> tuple[Lane | None, str]:
        """Clear cancelled and late rows out, then fill the lane that has waited longest."""
        now = time.monotonic()
        for lane in self._lanes:
            for row in lane.clear(now):
                row.fail(Rejected("the deadline passed before its turn came", row.cost, "deadline"))
                self._ended(row, "late")
        for lane in self._lanes:
            joined, reason = lane.fill(self.capacity)
            for row in joined:
                row.started = time.monotonic()
                if self.observer is not None:
                    self.observer.started(row.started - row.submitted)
            if lane.running:
                self._lanes.had_its_turn(lane)
                return lane, reason
        return None, "idle"

    # --- helpers

    def _encode(self, row: Row) -> None:
        """In the encoder's thread."""
        if row.cancelled:
            return
        row.base, row.members = self.embeddings.prompts(row.request, row.schedule)
        if row.request.shown is not None:
            row.seen = row.request.shown.seen
        if row.request.upload is not None:
            row.kept = encode(self.base, row.request.upload, row.latents)
            row.latents = row.kept.begin(row.schedule[row.index], row.request.upload.strength)
        with self._work:
            row.encoded = True
            self._work.notify()

    def _encoded(self, row: Row, future: "Future[None]") -> None:
        if (error := future.exception()) is not None:
            row.fail(error)

    def _ended(self, row: Row, outcome: str = "completed") -> None:
        if self.observer is not None:
            self.observer.ended(outcome, time.monotonic() - row.submitted)

    def _give_up(self, rows: Sequence[Row], error: Cancelled) -> int:
        with self._work:
            given_up = [row for row in rows if row.fail(error)]
            self._work.notify()
        for row in given_up:
            self._ended(row, "cancelled")
        return len(given_up)

    def _abandon(self) -> None:
        rows = [row for lane in self._lanes for row in (*lane.running, *lane.waiting)]
        self._give_up(rows, EngineEnded("the engine has ended"))

    def _row(self, request: ImageRequest, client: str) -> Row:
        key = (request.solver, request.num_steps)
        if key not in self._schedules:
            self._schedules[key] = schedule(self.base.scheduler, *key)
        noise = first_noise(request.seed, self._lanes.shape(request.size)).to(self.base.device)
        steps = begun_at(self._schedules[key], request.first_step)
        return Row(request, steps, noise, client, self.cost(request))

    def _measure(self, unet: Guided, shape: Shape, tried: Sequence[int]) -> dict[int, float]:
        try:
            return buckets.measure(unet, shape, self.base.null(), tried)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            # Compiled code is cached as it is written: what a killed process leaves is found, and fails, ever after.
            raise RuntimeError(
                f"model.compile = true: PyTorch could not compile the UNet: {error.inner_exception}. It needs a C++ "
                "compiler; and where an earlier start was killed while it compiled, remove its cache of compiled code "
                "(TORCHINDUCTOR_CACHE_DIR, by default torchinductor_USER in the folder for temporary files)"
            ) from error

    def _sample_latents(self) -> Tensor:
        """Two pictures of the model's own, in a few steps without guidance, for the preview to be fitted to."""
        rows = [self._row(ImageRequest("", seed=seed, num_steps=8, guidance_scale=1.0), "warm-up") for seed in (0, 1)]
        for row in rows:
            row.base, row.members = self.embeddings.prompts(row.request, row.schedule)
        while rows[0].remaining:
            advance(network(self.base, self.base.latent_shape), rows, max(2, self.capacity))
        return torch.stack([row.latents for row in rows])
