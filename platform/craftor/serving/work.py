"""One image asked for -> the row of latents that the engine carries from noise to picture."""

import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from craftor.denoise import Prompt
from craftor.encoders import Encoder
from craftor.mixture import Member, prompt_at
from craftor.serving.control import Control
from craftor.serving.objects import Shown
from craftor.serving.upload import Kept, Upload
from craftor.solver import Schedule


@dataclass(frozen=True)
class Share:
    """An encoder's part in a mixture: its weight, and the timesteps (noisiest first) between which it acts."""

    encoder: Encoder
    weight: float
    window: tuple[int, int]

    def steps(self, schedule: Schedule) -> range:
        """The denoising steps of a schedule inside the window; empty where the schedule steps over it."""
        first, last = self.window
        inside = [index for index, step in enumerate(schedule) if last <= step.timestep <= first]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


@dataclass(frozen=True)
class ImageRequest:
    """Everything that decides one image; equal requests are equal images."""

    prompt: str
    seed: int
    shares: tuple[Share, ...] = ()
    """The base encoder has the weight that they leave, step by step."""
    negative_prompt: str = ""
    num_steps: int = 25
    guidance_scale: float = 7.5
    solver: str = "ddim"
    size: tuple[int, int] | None = None
    """Height and width in pixels; by default the model's own."""
    upload: Upload | None = None
    """A picture to begin from, instead of noise alone."""
    control: Control | None = None
    """A picture for the server's ControlNet."""
    shown: Shown | None = None
    """An object to draw, by a UNet that sees one."""
    previews: int = 0
    """How many pictures of the predicted clean latents to show on the way."""

    @property
    def slots(self) -> int:
        """Places in a UNet call: guidance 1 needs no unconditional half, an object that guides apart a third part."""
        apart = self.shown is not None and self.shown.weight != self.guidance_scale
        return 3 if apart else 1 if self.guidance_scale == 1 else 2

    @property
    def company(self) -> tuple[str, int, bool] | None:
        """What rows of one UNet call have in common beside their latents' shape; None where any may share it."""
        return None if self.shown is None else self.shown.company

    @property
    def first_step(self) -> int:
        """The first denoising step taken: 0, unless it begins from a picture."""
        return 0 if self.upload is None else self.upload.first_step(self.num_steps)


class Listener(Protocol):
    """Told, from the decoding thread, how a row gets on."""

    def __call__(self, index: int, image: Float[Tensor, "3 H W"]) -> None: ...


class Cancelled(RuntimeError):
    """The row was given up before it was done."""


class EngineEnded(Cancelled):
    """With all others, for the engine has ended."""


class Observer(Protocol):
    """Told what the engine does; `metrics` counts it."""

    def stepped(self, slots: int, bucket: int, seconds: float, overhead: float, reason: str) -> None: ...
    def started(self, waited: float) -> None: ...
    def ended(self, outcome: str, seconds: float) -> None: ...


@dataclass(eq=False)
class Row:
    """A request on its way. Only the engine's thread moves it once it is `encoded`."""

    request: ImageRequest
    schedule: Schedule
    latents: Float[Tensor, "c h w"]
    client: str
    cost: float
    """Seconds of a full engine."""
    deadline: float | None = None
    """`time.monotonic()` after which nobody waits any more."""
    listener: Listener | None = None
    submitted: float = field(default_factory=time.monotonic)
    done: "Future[Float[Tensor, '3 H W']]" = field(default_factory=Future)
    index: int = 0
    """The denoising step to come."""
    started: float | None = None
    """When it joined its first UNet call."""
    denoised: float | None = None
    """When it left its last."""
    cancelled: bool = False
    encoded: bool = False
    passed_over: int = 0
    base: Prompt | None = None
    members: tuple[Member, ...] = ()
    kept: Kept | None = None
    """Of an uploaded picture."""
    seen: Tensor | None = None
    """`(1, n, *tokens, d)`: of an object's pictures, as soon as the row is encoded."""
    previous: Tensor = field(init=False)
    """The clean latents predicted last: what multistep solvers read, and previews show."""
    _mixed: tuple[tuple[int, ...], Prompt] | None = None

    def __post_init__(self) -> None:
        self.previous = torch.zeros_like(self.latents)
        self.index = self.request.first_step

    @property
    def remaining(self) -> int:
        return len(self.schedule) - self.index

    @property
    def taken(self) -> int:
        """Denoising steps in all."""
        return len(self.schedule) - self.request.first_step

    def prompt(self) -> Prompt:
        """What the coming step sees; mixed again only where a member's window opens or closes."""
        assert self.base is not None
        active = tuple(i for i, member in enumerate(self.members) if self.index in member.steps)
        if self._mixed is None or self._mixed[0] != active:
            self._mixed = active, prompt_at(self.base, self.members, self.index)
        return self._mixed[1]

    def sees(self) -> Tensor | None:
        """The object, from the step on that first does."""
        shown = self.request.shown
        return self.seen if shown is not None and self.index >= shown.from_step else None

    def finish(self, image: Float[Tensor, "3 H W"]) -> bool:
        """The row's good end; False where it had ended otherwise."""
        try:
            self.done.set_result(image)
        except InvalidStateError:
            return False
        return True

    def fail(self, error: BaseException) -> bool:
        """Its other end: the engine lets go of it at the next step. False where it had ended already."""
        try:
            self.done.set_exception(error)
        except InvalidStateError:
            return False
        self.cancelled = True
        return True

    def shows_preview(self) -> bool:
        """Whether the step just taken is one of `previews` at equal distances, the finished picture not counted."""
        count, first = self.request.previews, self.request.first_step
        shown = (first + round(self.taken * k / (count + 1)) for k in range(1, count + 1))
        return self.index in shown and self.remaining > 0


def first_noise(seed: int, shape: tuple[int, int, int]) -> Float[Tensor, "c h w"]:
    """The noise that diffusers draws from `torch.Generator().manual_seed(seed)`: the same seed, the same picture."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))[0]
