"""The chain's gradient is that of plain autograd and of finite differences, whatever the window."""

from pathlib import Path

import pytest
import torch

from craftor.denoise import Chain, Guided, sample
from craftor.diffuser import load

NUM_STEPS = 5


@pytest.fixture(scope="module")
def guided(tiny: Path) -> Guided:
    guided = load(str(tiny / "pipeline")).guided(NUM_STEPS, guidance_scale=3.0)
    guided.unet.double()
    return guided


def inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 8, 8), (2, 6, 16), (1, 6, 16), (2, 6, 16), (1, 6, 16), (2, 4, 8, 8))
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


def chain_gradient(guided: Guided, window: range, recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    noise, tuned, tuned_null, original, null, direction = inputs()
    latents = sample(guided, noise, original, null, range(window.start))
    chain = Chain(guided, tuned, tuned_null, (original, null), window, recompute)
    chain.forward(latents)
    return chain.backward(direction)


def plain_loss(guided: Guided, window: range, tuned: torch.Tensor, tuned_null: torch.Tensor) -> torch.Tensor:
    """The same rollout as one autograd graph."""
    noise, _, _, original, null, direction = inputs()
    latents = noise
    for index in range(NUM_STEPS):
        condition = (tuned, tuned_null) if index in window else (original, null)
        latents = guided.step(latents, *condition, index)
    return (latents * direction).sum()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [range(3, 5), range(1, 3), range(0, 5), range(4, 5)])
def test_gradient_is_that_of_plain_autograd(guided: Guided, window: range, recompute: bool) -> None:
    _, tuned, tuned_null, *_ = inputs()
    tuned, tuned_null = tuned.requires_grad_(), tuned_null.requires_grad_()
    expected = torch.autograd.grad(plain_loss(guided, window, tuned, tuned_null), (tuned, tuned_null))
    for found, wanted in zip(chain_gradient(guided, window, recompute), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_finite_differences(guided: Guided) -> None:
    window = range(2, 5)
    gradient, null_gradient = chain_gradient(guided, window, recompute=False)
    _, tuned, tuned_null, *_ = inputs()
    step = 1e-5
    with torch.no_grad():
        for target, found in ((tuned, gradient), (tuned_null, null_gradient)):
            for position in ((0, 0, 0), (0, 3, 5), (len(target) - 1, 5, 15)):
                values = []
                for sign in (1, -1):
                    target[position] += sign * step
                    values.append(plain_loss(guided, window, tuned, tuned_null).item())
                    target[position] -= sign * step
                assert found[position].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-7)


def test_forward_ends_where_sampling_ends(guided: Guided) -> None:
    noise, tuned, tuned_null, *_ = inputs()
    chain = Chain(guided, tuned, tuned_null, (tuned, tuned_null), range(2, 5), recompute=True)
    final = chain.forward(sample(guided, noise, tuned, tuned_null, range(2)))
    torch.testing.assert_close(final.detach(), sample(guided, noise, tuned, tuned_null, range(5)))


def test_schedule_is_trailing(tiny: Path) -> None:
    timesteps = load(str(tiny / "pipeline")).guided(25, 7.5).scheduler.timesteps.tolist()
    assert timesteps == list(range(999, 38, -40))
    assert len(timesteps) == 25


def test_guidance_of_one_skips_the_unconditional_branch(tiny: Path) -> None:
    diffuser = load(str(tiny / "pipeline"))
    rows: list[int] = []
    diffuser.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    embeds, null = torch.randn(2, 6, 16), torch.randn(1, 6, 16)
    sample(diffuser.guided(3, 1.0), torch.randn(2, 4, 8, 8), embeds, null, range(3))
    sample(diffuser.guided(3, 2.0), torch.randn(2, 4, 8, 8), embeds, null, range(3))
    assert rows == [2, 2, 2, 4, 4, 4]
