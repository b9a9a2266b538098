"""The chain's gradient is that of plain autograd and of finite differences, whatever the window."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from craftor.denoise import Chain, Guided, Prompt, State, sample
from craftor.diffuser import load
from craftor.embed import Condition
from craftor.plan import Plan, plan
from craftor.recipe import Model
from craftor.rollout import Rollout, Window

NUM_STEPS = 5
WINDOWS = {
    "last": Window(last=2),
    "all": Window(last=5),
    "first": Window(first=2),
    "middle": Window(start=1, stop=3),
    "list": Window(steps=(0, 2, 3)),
    "random": Window(random_last=(1, 4)),
    "sparse": Window(sparse=2),
    "refl": Window(last=1, jump=(1, 4)),
    "drtune": Window(sparse=2, jump=(2, 4)),
}


@pytest.fixture(scope="module", params=["ddim", "dpm_solver_2m"])
def guided(request, tiny: Path) -> Guided:
    diffuser = load(Model(path=str(tiny / "pipeline")))
    diffuser.unet.double()
    return diffuser.guided(Rollout(num_steps=NUM_STEPS, guidance_scale=3.0, solver=request.param))


def prompts(seed: int = 0) -> tuple[State, Prompt, Prompt, torch.Tensor]:
    """Noise, a tuned and an original prompt, and a direction to differentiate along; three samples."""
    g = torch.Generator().manual_seed(seed)
    noise, direction = (torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    tuned, original = (
        Prompt(*(Condition(torch.randn(n, 6, 16, generator=g, dtype=torch.float64)) for n in (3, 1))) for _ in range(2)
    )
    return State(noise), tuned, original, direction


def gradient_leaves(tuned: Prompt) -> Prompt:
    return Prompt(*(condition.map(lambda t: t.requires_grad_()).leaf() for condition in tuned))


def chain(guided: Guided, where: Plan, direct: bool, kept: int) -> tuple[torch.Tensor, Prompt]:
    """The final latents and the tuned prompt with its gradient."""
    state, tuned, original, direction = prompts()
    leaves = gradient_leaves(tuned)
    chain = Chain(guided, where, leaves, original, direct, kept)
    final = chain.forward(sample(guided, state, original, range(where.start)))
    chain.backward(direction)
    return final.detach(), leaves


def plain(guided: Guided, where: Plan, direct: bool, tuned: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rollout sample by sample as one autograd graph: final latents, and their product with the direction."""
    state, _, original, direction = prompts()
    finals = []
    for row in range(3):
        latents, x0, ended = state.latents[row : row + 1], None, None
        for index in range(NUM_STEPS):
            if index == where.first[row]:
                latents, x0 = latents.detach(), None if x0 is None else x0.detach()
            chosen = tuned if where.window[row, index] else original
            prompt = Prompt(chosen.condition[row : row + 1], chosen.null)
            output = guided.output(latents.detach() if direct else latents, prompt, guided.schedule[index].timestep)
            step = guided.schedule[index]
            new = step.x0(latents, output)
            latents, x0 = step.advance(latents, new, x0), new
            if where.jumps and index == where.end[row]:
                ended = new
        finals.append(latents if ended is None else ended)
    final = torch.cat(finals)
    return final.detach(), (final * direction).sum()


@pytest.mark.parametrize(("direct", "kept"), [(False, 0), (False, 2), (True, 9)])
@pytest.mark.parametrize("name", WINDOWS)
def test_gradient_is_that_of_plain_autograd(guided: Guided, name: str, direct: bool, kept: int) -> None:
    where = plan(WINDOWS[name], NUM_STEPS, seed=3, positions=range(3))
    final, leaves = chain(guided, where, direct, kept)
    _, tuned, *_ = prompts()
    tuned = gradient_leaves(tuned)
    expected_final, loss = plain(guided, where, direct, tuned)
    torch.testing.assert_close(final, expected_final, rtol=1e-9, atol=1e-11)
    loss.backward()
    for found, wanted in zip(leaves, tuned, strict=True):
        torch.testing.assert_close(found.embeds.grad, wanted.embeds.grad, rtol=1e-8, atol=1e-11)


def test_gradient_is_that_of_finite_differences(guided: Guided) -> None:
    where = plan(Window(start=1, stop=4), NUM_STEPS, 0, range(3))
    _, leaves = chain(guided, where, direct=False, kept=0)
    _, tuned, *_ = prompts()
    step = 1e-5
    with torch.no_grad():
        for target, found in ((tuned.condition.embeds, leaves.condition), (tuned.null.embeds, leaves.null)):
            for position in ((0, 0, 0), (0, 3, 5), (len(target) - 1, 5, 15)):
                values = []
                for sign in (1, -1):
                    target[position] += sign * step
                    values.append(plain(guided, where, False, tuned)[1].item())
                    target[position] -= sign * step
                wanted = (values[0] - values[1]) / (2 * step)
                assert found.embeds.grad[position].item() == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("direct", [False, True])
def test_the_unet_receives_the_gradient_of_its_own_window(guided: Guided, direct: bool) -> None:
    where = plan(Window(start=1, stop=4), NUM_STEPS, 0, range(3))
    parameters = [p.requires_grad_() for p in guided.unet.parameters()]
    try:
        chain(guided, where, direct, kept=1)
        found = [p.grad.clone() for p in parameters]
        guided.unet.zero_grad()
        frozen = copy.deepcopy(guided.unet).requires_grad_(False)
        _, tuned, *_ = prompts()
        windowed = dataclasses.replace(guided, unet=_Switch(guided.unet, frozen, guided, range(1, 4)))
        plain(windowed, where, direct, tuned)[1].backward()
        for value, parameter in zip(found, parameters, strict=True):
            torch.testing.assert_close(value, parameter.grad, rtol=1e-8, atol=1e-11)
    finally:
        guided.unet.zero_grad()
        guided.unet.requires_grad_(False)


class _Switch:
    """The trained UNet inside the window, a frozen copy of it outside."""

    def __init__(self, trained, frozen, guided: Guided, window: range) -> None:
        self.inside = {guided.schedule[index].timestep for index in window}
        self.trained, self.frozen = trained, frozen

    def __call__(self, latents, timestep, *args, **kwargs):
        return (self.trained if timestep in self.inside else self.frozen)(latents, timestep, *args, **kwargs)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_reduced_precision_keeps_the_gradients_direction(tiny: Path, precision: torch.dtype, size: float) -> None:
    """Even one as small as the mean over a large batch makes it, which float16 by itself would lose."""
    diffuser = load(Model(path=str(tiny / "pipeline")))
    state, tuned, original, direction = (
        part.float() if isinstance(part, torch.Tensor) else type(part)(*(_float(p) for p in part)) for part in prompts()
    )
    found = []
    for arithmetic in (torch.float32, precision):
        rollout = Rollout(num_steps=NUM_STEPS, guidance_scale=3.0)
        guided = dataclasses.replace(diffuser.guided(rollout), precision=arithmetic)
        leaves = gradient_leaves(tuned)
        chain = Chain(guided, plan(Window(last=3), NUM_STEPS, 0, range(3)), leaves, original)
        chain.forward(sample(guided, state, original, range(2)))
        chain.backward(size * direction)
        found.append(torch.cat([leaves.condition.embeds.grad, leaves.null.embeds.grad]).flatten() / size)
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99
    assert found[1].norm() / found[0].norm() == pytest.approx(1, abs=0.05)


def _float(part: torch.Tensor | Condition | None) -> torch.Tensor | Condition | None:
    if part is None:
        return None
    return part.map(lambda tensor: tensor.detach().float()) if isinstance(part, Condition) else part.float()


def test_forward_ends_where_sampling_ends(guided: Guided) -> None:
    state, tuned, *_ = prompts()
    where = plan(Window(last=3), NUM_STEPS, 0, range(3))
    chain = Chain(guided, where, tuned, tuned, kept=0)
    final = chain.forward(sample(guided, state, tuned, range(2)))
    torch.testing.assert_close(final.detach(), sample(guided, state, tuned, range(5)).latents)


def test_guidance_of_one_skips_the_unconditional_branch(tiny: Path) -> None:
    diffuser = load(Model(path=str(tiny / "pipeline")))
    rows: list[int] = []
    diffuser.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    prompt = Prompt(Condition(torch.randn(2, 6, 16)), Condition(torch.randn(1, 6, 16)))
    for scale in (1.0, 2.0):
        guided = diffuser.guided(Rollout(num_steps=3, guidance_scale=scale))
        sample(guided, State(torch.randn(2, 4, 8, 8)), prompt, range(3))
    assert rows == [2, 2, 2, 4, 4, 4]
