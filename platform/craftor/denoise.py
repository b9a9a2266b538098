"""Condition and noise -> latents: guided denoising steps, and their exact gradient one step at a time.

A step is a network call and a linear map (`solver`). Backward walks the steps from the last to the first of the window:
the map's gradient is its own coefficients, the network's a vector-Jacobian product, whose graph was kept or is rebuilt
when its turn comes (`kept`), so memory need not grow with the window. The gradient collects in the leaves it is for:
the trained encoders' conditions and, where the UNet trains, its parameters.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor

from craftor.embed import Condition
from craftor.plan import Plan
from craftor.solver import Schedule


class State(NamedTuple):
    """Between two denoising steps: latents, and the clean latents predicted last, which multistep solvers read."""

    latents: Float[Tensor, "b c h w"]
    x0: Float[Tensor, "b c h w"] | None = None


class Prompt(NamedTuple):
    """The two branches of guidance: the prompts' condition, and the empty prompt's single row."""

    condition: Condition
    null: Condition


@dataclass(frozen=True)
class Guided:
    """A UNet with its schedule and classifier-free guidance."""

    unet: UNet2DConditionModel
    schedule: Schedule
    guidance_scale: float
    precision: torch.dtype = torch.float32
    """Arithmetic of the UNet; latents and schedule stay in float32."""
    time_ids: Float[Tensor, "1 6"] | None = None
    """SDXL's micro-conditioning: original size, crop corner, target size."""

    @property
    def num_steps(self) -> int:
        return len(self.schedule)

    def output(
        self, latents: Float[Tensor, "b c h w"], prompt: Prompt, timestep: int | Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The network's output under guidance w at one timestep, or one a row: `null + w * (conditional - null)`."""
        condition, null = prompt
        if self.guidance_scale == 1:
            return self.call(latents, timestep, condition)
        pairs = zip(null.tensors, condition.tensors, strict=True)
        both = condition.like(torch.cat([n.expand_as(c), c]) for n, c in pairs)
        timestep = timestep if isinstance(timestep, int) else timestep.repeat(2)
        unconditional, conditional = self.call(torch.cat([latents, latents]), timestep, both).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def step(self, state: State, prompt: Prompt, index: int) -> State:
        """Denoising step `index`; 0 is the noisiest."""
        step = self.schedule[index]
        x0 = step.x0(state.latents, self.output(state.latents, prompt, step.timestep))
        return State(step.advance(state.latents, x0, state.x0), x0)

    def call(self, latents: Tensor, timestep: int | Tensor, condition: Condition, **more: Any) -> Tensor:
        """The network once, without guidance; `more` may be what a ControlNet adds to its blocks, or regions."""
        added = self.added(condition, len(latents))
        with self.arithmetic(latents):
            output = self.unet(latents, timestep, condition.embeds, added_cond_kwargs=added, **more).sample
        return output.to(latents.dtype)

    def added(self, condition: Condition, rows: int) -> dict[str, Any] | None:
        """What networks read beside the prompt: in SDXL its pooled form and image sizes; an object's tokens."""
        added: dict[str, Any] = {}
        if condition.pooled is not None and self.time_ids is not None:
            added = {"text_embeds": condition.pooled, "time_ids": self.time_ids.expand(rows, -1)}
        if condition.image is not None:
            added["image_embeds"] = [condition.image]
        return added or None

    def arithmetic(self, latents: Tensor) -> AbstractContextManager:
        """The precision in which networks compute inside the block."""
        reduced = self.precision in (torch.bfloat16, torch.float16)
        return torch.autocast(latents.device.type, self.precision) if reduced else nullcontext()


@torch.no_grad()
def sample(guided: Guided, state: State, prompt: Prompt, steps: range) -> State:
    """Run denoising steps without gradient."""
    for index in steps:
        state = guided.step(state, prompt, index)
    return state


@dataclass
class _Call:
    """A network call: which rows see which prompt, and whether the gradient passes."""

    index: int
    rows: Tensor | slice
    inside: bool
    latents: Tensor
    """A leaf; it requires gradient where earlier steps receive it."""
    output: Tensor | None = None
    """With its graph where that is kept; None where it is to be rebuilt."""

    @property
    def carries(self) -> bool:
        return self.inside or self.latents.requires_grad


@dataclass
class Chain:
    """The part of a rollout that carries gradient: from the plan's first step to the end.

    Steps in a row's window see `tuned`. Its other steps see `outside` and, in a full gradient path, pass the gradient
    on to earlier latents.
    """

    guided: Guided
    plan: Plan
    tuned: Prompt
    """Its tensors that require gradient receive it in `.grad`; see `Condition.leaf`."""
    outside: Prompt
    direct: bool = False
    kept: int = 1 << 30
    """So many of the last steps keep their graph, the others are rebuilt."""
    _calls: list[list[_Call]] = field(default_factory=list, init=False)

    def forward(self, state: State) -> Float[Tensor, "b c h w"]:
        """Clean latents at each row's end, a leaf to differentiate decoder and rewards with respect to."""
        final = torch.zeros_like(state.latents)
        for index in range(self.plan.start, self.plan.num_steps):
            step = self.guided.schedule[index]
            output = torch.zeros_like(state.latents)
            self._calls.append([])
            for call in self._calls_at(index, state.latents):
                kept = call.carries and index >= self.plan.num_steps - self.kept
                found = self._run(call, with_graph=kept)
                output[call.rows] = found.detach()
                if call.carries:
                    call.output = found if kept else None
                    self._calls[-1].append(call)
            x0 = step.x0(state.latents, output)
            if self.plan.jumps:
                final = torch.where(_column(self.plan.end == index, x0), x0, final)
            state = State(step.advance(state.latents, x0, state.x0), x0)
        return (final if self.plan.jumps else state.latents).requires_grad_()

    def backward(self, gradient: Float[Tensor, "b c h w"]) -> None:
        """From dL/d(final latents) to the `.grad` of the tuned prompt and of the trained parameters.

        With G = dL/d(next latents) and H = dL/dx0 from the step after, one step's x0 receives `new * G + H`.
        """
        scale = self._scale(gradient)
        gradient = scale * gradient
        by_latents = torch.zeros_like(gradient) if self.plan.jumps else gradient
        by_x0 = torch.zeros_like(gradient)
        for index in reversed(range(self.plan.start, self.plan.num_steps)):
            step = self.guided.schedule[index]
            here = step.new * by_latents + by_x0
            if self.plan.jumps:
                here = here + _column(self.plan.end == index, gradient) * gradient
            by_x0 = step.old * by_latents
            by_latents = step.keep * by_latents + step.p * here
            for call in self._calls.pop():
                output = self._run(call, with_graph=True) if call.output is None else call.output
                # Inside the window every leaf of the graph receives it. The UNet's cannot be named here: one that is
                # sharded has others in its graph than among its parameters.
                torch.autograd.backward(output, step.q * here[call.rows], inputs=None if call.inside else call.latents)
                if call.latents.grad is not None:
                    by_latents[call.rows] += call.latents.grad
        for tensor in (*self.tuned.condition.tensors, *self.tuned.null.tensors):
            if tensor.grad is not None:
                tensor.grad /= scale

    def _scale(self, gradient: Tensor) -> Tensor | float:
        """float16 loses gradients as small as a mean over a batch; the walk is linear, so it can run scaled up."""
        if self.guided.precision != torch.float16:
            return 1.0
        assert not any(p.requires_grad for p in self.guided.unet.parameters()), (
            "the UNet's own gradient would stay scaled"
        )
        return gradient.abs().max().clamp(min=1e-30).reciprocal()

    def _calls_at(self, index: int, latents: Tensor) -> Iterator[_Call]:
        """The rows that still run, grouped by what their gradient needs of this step."""
        alive, inside = self.plan.end >= index, self.plan.window[:, index]
        passing = torch.zeros_like(alive) if self.direct else self.plan.first < index
        for group, in_window, passes in (
            (alive & inside, True, bool((passing & inside).any())),
            (alive & ~inside & passing, False, True),
            (alive & ~inside & ~passing, False, False),
        ):
            if not group.any():
                continue
            rows = slice(None) if group.all() else group.nonzero().flatten()
            yield _Call(index, rows, in_window, latents[rows].detach().requires_grad_(passes))

    def _run(self, call: _Call, *, with_graph: bool) -> Tensor:
        with torch.set_grad_enabled(with_graph):
            condition, null = self.tuned if call.inside else self.outside
            timestep = self.guided.schedule[call.index].timestep
            return self.guided.output(call.latents, Prompt(condition[call.rows], null), timestep)


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device).view(-1, 1, 1, 1)
