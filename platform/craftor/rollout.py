"""How a rollout runs and where it carries gradient: the settings of one mechanism. Imports no torch.

Every method of reward backpropagation is a choice of denoising steps, of what those outside see, and of how far the
gradient reaches back; `PRESETS` holds the papers' choices. Numbers of denoising steps are relative to `of`, so that
"the last 5 of 25" selects the same timesteps whatever number of steps a rollout takes.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PRESETS: dict[str, dict[str, Any]] = {
    "textcraftor": {"last": 5, "of": 25},
    "draft": {"last": 1, "outside": "tuned"},
    "draft_lv": {"last": 1, "copies": 2, "outside": "tuned"},
    "alignprop": {"random_last": (1, 50), "of": 50, "outside": "tuned"},
    "refl": {"last": 1, "jump": (30, 39), "of": 40, "outside": "tuned"},
    "drtune": {"sparse": 5, "jump": (40, 49), "of": 50, "gradient_path": "direct", "outside": "tuned"},
}
FORMS = ("last", "first", "start", "steps", "random_last", "sparse")
"""Keys of which a window has exactly one; `start` goes with `stop`."""

Pair = Annotated[tuple[int, int], Field(strict=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rollout(Section):
    num_steps: int = Field(25, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1)
    solver: Literal["ddim", "euler", "dpm_solver_2m"] = "ddim"


class Window(Section):
    """Denoising steps whose embeddings come from the trained encoder, with gradient."""

    preset: Literal["textcraftor", "draft", "draft_lv", "alignprop", "refl", "drtune"] | None = None
    """Start from a paper's choice; other keys override it."""
    last: int | None = Field(None, ge=1)
    first: int | None = Field(None, ge=1)
    start: int | None = Field(None, ge=0)
    stop: int | None = Field(None, ge=1)
    steps: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    random_last: Pair | None = None
    """The last K steps, K drawn once per sample from this range (AlignProp)."""
    sparse: int | None = Field(None, ge=1)
    """So many steps at equal distances, from a random one on, drawn once per sample (DRTune)."""
    jump: Pair | None = None
    """End each sample after a step drawn from this range, by the clean latents predicted there (ReFL)."""
    of: int | None = Field(None, ge=1, le=1000)
    """The number of steps that the numbers above count in; by default the rollout's."""
    copies: int = Field(1, ge=1, le=64)
    """DRaFT-LV: noise the finished sample so many times to the last step and average the gradient."""
    gradient_path: Literal["full", "direct"] = "full"
    """`direct` stops the gradient at the network's input; earlier steps get it through the solver alone (DRTune)."""
    outside: Literal["original", "tuned"] = "original"
    """The encoder that steps outside the window see, always without gradient."""
    null: Literal["tuned", "tuned_no_grad", "original"] = "tuned"
    """What the unconditional branch of guidance sees in the window; `tuned` trains it too, as TextCraftor does."""
    recompute: bool | int | Literal["auto"] = False
    """Rebuild a step's graph when the gradient comes through, instead of keeping it: true for every step, or how many;
    `auto` keeps what fits in `memory_limit_gib`."""
    memory_limit_gib: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        """A preset's keys, unless the recipe chooses another form of window."""
        if not isinstance(data, dict) or data.get("preset") not in PRESETS:
            return data
        preset = PRESETS[data["preset"]]
        if any(form in data for form in FORMS):
            preset = {key: value for key, value in preset.items() if key not in FORMS}
            preset = {key: value for key, value in preset.items() if key != "of" or "jump" in preset}
        return {**preset, **data}

    @model_validator(mode="after")
    def _consistent(self) -> "Window":
        given = [form for form in FORMS if getattr(self, form) is not None]
        if len(given) != 1 or (self.start is None) != (self.stop is None):
            found = ", ".join(given) or "none of them"
            raise ValueError(
                f"give exactly one of {', '.join(FORMS[:2])}, start with stop, {', '.join(FORMS[3:])} (got {found})"
            )
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise ValueError(f"start = {self.start} is not before stop = {self.stop}")
        for name in ("random_last", "jump"):
            pair = getattr(self, name)
            if pair is not None and not 0 <= pair[0] <= pair[1]:
                raise ValueError(f"{name} = {list(pair)}: expected [low, high] with 0 <= low <= high")
        if self.random_last is not None and self.random_last[0] < 1:
            raise ValueError(f"random_last = {list(self.random_last)}: at least 1 step carries gradient")
        if self.steps is not None and (self.of is not None or list(self.steps) != sorted({*self.steps})):
            raise ValueError(f"steps = {list(self.steps)}: distinct, in order, and counted in the rollout's own steps")
        if self.jump is not None and not (self.last or self.sparse):
            raise ValueError("jump goes with last or sparse: the steps before the jump that carry gradient")
        if self.copies > 1 and self.last != 1:
            raise ValueError(f"copies = {self.copies} goes with last = 1: copies are noised to the last step")
        if (self.recompute == "auto") != (self.memory_limit_gib is not None):
            raise ValueError('recompute = "auto" and memory_limit_gib go together')
        return self

    def span(self, num_steps: int) -> range:
        """The denoising steps of a `num_steps` rollout that may carry gradient, earliest to latest.

        Raises ValueError where the window does not fit in the rollout.
        """
        low, high = self._ends(num_steps)
        if low < 0 or high > num_steps or low >= high:
            raise ValueError(
                f"window: denoising steps {low}..{high - 1} do not fit in rollout.num_steps = {num_steps}"
                f"; allowed: last <= {num_steps}, stop <= {num_steps}, at least one step"
            )
        return range(low, high)

    def step_number(self, number: int, num_steps: int) -> int:
        """The first step of a `num_steps` rollout that is no noisier than step `number` of `of`."""
        return -(-number * num_steps // (self.of or num_steps))

    def _ends(self, num_steps: int) -> tuple[int, int]:
        of = self.of or num_steps
        at = lambda number: self.step_number(number, num_steps)  # noqa: E731
        latest = min(at(self.jump[1]) + 1, num_steps) if self.jump else num_steps
        earliest = min(at(self.jump[0]), num_steps - 1) if self.jump else num_steps - 1
        if self.first is not None:
            return 0, at(self.first)
        if self.start is not None and self.stop is not None:
            return at(self.start), at(self.stop)
        if self.steps is not None:
            return self.steps[0], self.steps[-1] + 1
        if self.random_last is not None:
            return at(of - self.random_last[1]), num_steps
        if self.sparse is not None:
            return (0 if self.sparse <= earliest + 1 else earliest + 1 - self.sparse), latest
        assert self.last is not None
        count = self.last if self.jump else num_steps - at(of - self.last)
        return earliest + 1 - count, latest


@dataclass(frozen=True)
class Drawn:
    """One sample's share of a window."""

    steps: tuple[int, ...]
    """Denoising steps that carry its gradient."""
    end: int | None
    """The step after which it ends by its predicted clean latents, where the window has a jump."""


def draw(window: Window, num_steps: int, end: float, choice: float) -> Drawn:
    """A sample's steps from two numbers in [0, 1) of its own: one for the jump, one for the steps."""
    at = lambda number: window.step_number(number, num_steps)  # noqa: E731
    stop = num_steps - 1
    if window.jump is not None:
        low, high = (min(at(number), num_steps - 1) for number in window.jump)
        stop = low + int(end * (high - low + 1))
    last = stop if window.jump is not None else None
    if window.steps is not None:
        return Drawn(window.steps, last)
    if window.random_last is not None:
        of = window.of or num_steps
        low, high = (num_steps - at(of - number) for number in window.random_last)
        count = low + int(choice * (high - low + 1))
        return Drawn(tuple(range(num_steps - max(count, 1), num_steps)), last)
    if window.sparse is not None:
        stride = max((stop + 1) // window.sparse, 1)
        offset = int(choice * stride)
        return Drawn(tuple(offset + stride * i for i in range(window.sparse)), last)
    span = window.span(num_steps)
    if window.last is not None and window.jump is not None:
        return Drawn(tuple(range(stop + 1 - window.last, stop + 1)), last)
    return Drawn(tuple(span), last)
