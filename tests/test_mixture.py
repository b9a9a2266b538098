"""Interpolation identities: weight 0 is the base and weight 1 the tuned encoder, bit for bit, inside its steps only."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from craftor.denoise import Prompt, State
from craftor.diffuser import load
from craftor.embed import Condition, mix
from craftor.mixture import Member, prompt_at, sample_mixture
from craftor.recipe import Model
from craftor.rollout import Rollout


def prompt(seed: int) -> Prompt:
    g = torch.Generator().manual_seed(seed)
    return Prompt(Condition(torch.randn(2, 6, 16, generator=g)), Condition(torch.randn(1, 6, 16, generator=g)))


BASE, TUNED, OTHER = prompt(0), prompt(1), prompt(2)


def test_weight_zero_is_the_base_and_weight_one_the_tuned() -> None:
    assert prompt_at(BASE, [Member(TUNED, 0.0, range(5))], 0) is BASE
    assert torch.equal(prompt_at(BASE, [Member(TUNED, 1.0, range(5))], 0).condition.embeds, TUNED.condition.embeds)
    assert torch.equal(prompt_at(BASE, [Member(TUNED, 1.0, range(5))], 0).null.embeds, TUNED.null.embeds)


def test_a_member_acts_in_its_own_steps_only() -> None:
    members = [Member(TUNED, 1.0, range(3, 5)), Member(OTHER, 1.0, range(1, 3))]
    seen = [prompt_at(BASE, members, index) for index in range(6)]
    expected = [BASE, OTHER, OTHER, TUNED, TUNED, BASE]
    assert all(torch.equal(a.condition.embeds, b.condition.embeds) for a, b in zip(seen, expected, strict=True))


@given(st.floats(0.01, 0.99))
def test_mixing_is_linear(weight: float) -> None:
    base = BASE.condition.embeds
    mixed = prompt_at(BASE, [Member(TUNED, weight, range(5))], 0).condition.embeds
    torch.testing.assert_close(mixed, base + weight * (TUNED.condition.embeds - base), rtol=1e-4, atol=1e-5)


def test_weights_must_match_and_sum_to_one() -> None:
    with pytest.raises(ValueError, match="sum to 0.5, allowed: 1"):
        mix([BASE.condition, TUNED.condition], [0.25, 0.25])
    with pytest.raises(ValueError, match="2 encoders but 1 weights"):
        mix([BASE.condition, TUNED.condition], [1.0])


def test_images_of_weight_zero_are_those_of_the_base(tiny: Path) -> None:
    guided = load(Model(path=str(tiny / "pipeline"))).guided(Rollout(num_steps=4, guidance_scale=3.0))
    noise = State(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)))

    def image(members: list[Member]) -> torch.Tensor:
        return sample_mixture(guided, noise, BASE, members, range(4)).latents

    assert torch.equal(image([Member(TUNED, 0.0, range(4))]), image([]))
    assert not torch.equal(image([Member(TUNED, 0.5, range(2, 4))]), image([]))
