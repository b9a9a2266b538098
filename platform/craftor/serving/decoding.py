"""Latents -> pictures in a thread of their own, so that no denoising step waits for the decoder.

Pictures are decoded one at a time: a decoder fills a device by itself (on CPUs a batch is no faster), a preview never
waits behind a batch, and a picture's bits depend on nothing else in flight. Where the UNet computes in bfloat16 the
decoder does so too, as a pipeline of that precision; float16 is too narrow for many a decoder, so there it is float32.
"""

import queue
import threading
from collections.abc import Callable

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from craftor.decode import decode
from craftor.diffuser import Diffuser
from craftor.serving.work import Row

Preview = Callable[[Float[Tensor, "c h w"]], Float[Tensor, "3 H W"]]


class Decoder:
    """`finish` and `preview` return at once; results go to the row's future and listener, on the CPU in [0, 1]."""

    def __init__(self, base: Diffuser, preview: Preview, finished: Callable[[Row], None]) -> None:
        self._vae, self._preview, self._finished = base.vae, preview, finished
        self._precision = torch.bfloat16 if base.precision == torch.bfloat16 else torch.float32
        self._queue: queue.SimpleQueue[tuple[Row, Tensor, bool, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="craftor-decoder", daemon=True)
        self._thread.start()

    def finish(self, row: Row) -> None:
        self._queue.put((row, row.latents, True, row.index))

    def preview(self, row: Row) -> None:
        self._queue.put((row, row.previous, False, row.index))

    def stop(self) -> None:
        """After what is queued."""
        self._queue.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            row, latents, last, index = item
            if row.cancelled:
                continue
            try:
                with torch.inference_mode():
                    image = self._picture(latents) if last else self._preview(latents)
            except BaseException as error:
                row.fail(error)  # nobody waits for ever; the thread ends, and with it the engine
                raise
            image = image.clamp(0, 1).cpu()
            if not last and row.listener is not None:
                row.listener(index, image)
            elif last and row.finish(image):
                self._finished(row)

    def _picture(self, latents: Float[Tensor, "c h w"]) -> Float[Tensor, "3 H W"]:
        return decode(self._vae, latents[None], self._precision)[0].float()


def previewer(base: Diffuser, latents: Float[Tensor, "b c h w"]) -> Preview:
    """A cheap look at latents: the decoder itself where it is a tiny one, else the best linear map to colours.

    `latents` are finished ones of this model, whose decoded pictures the map is fitted to, by least squares.
    """
    vae = base.vae
    if isinstance(vae, AutoencoderTiny):
        return lambda one: decode(vae, one[None])[0]
    with torch.inference_mode():
        pictures = torch.nn.functional.interpolate(decode(vae, latents), size=latents.shape[-2:], mode="area")
    known = torch.nn.functional.pad(latents.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)
    colours = torch.linalg.lstsq(known.cpu(), pictures.movedim(1, -1).flatten(0, 2).cpu()).solution.to(latents.device)
    return lambda one: torch.einsum("chw,cd->dhw", one, colours[:-1]) + colours[-1].view(3, 1, 1)
