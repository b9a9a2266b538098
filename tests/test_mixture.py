"""Interpolation identities: weight 0 is the base and weight 1 the tuned encoder, bit for bit, inside its steps only."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from craftor.diffuser import load
from craftor.embed import mix
from craftor.mixture import Condition, Member, condition_at, sample_mixture


def condition(seed: int) -> Condition:
    g = torch.Generator().manual_seed(seed)
    return Condition(torch.randn(2, 6, 16, generator=g), torch.randn(1, 6, 16, generator=g))


BASE, TUNED, OTHER = condition(0), condition(1), condition(2)


def test_weight_zero_is_the_base_and_weight_one_the_tuned() -> None:
    assert condition_at(BASE, [Member(TUNED, 0.0, range(5))], 0) is BASE
    assert torch.equal(condition_at(BASE, [Member(TUNED, 1.0, range(5))], 0).embeds, TUNED.embeds)
    assert torch.equal(condition_at(BASE, [Member(TUNED, 1.0, range(5))], 0).null, TUNED.null)


def test_a_member_acts_in_its_own_steps_only() -> None:
    members = [Member(TUNED, 1.0, range(3, 5)), Member(OTHER, 1.0, range(1, 3))]
    seen = [condition_at(BASE, members, index) for index in range(6)]
    expected = [BASE, OTHER, OTHER, TUNED, TUNED, BASE]
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(seen, expected, strict=True))


@given(st.floats(0.01, 0.99))
def test_mixing_is_linear(weight: float) -> None:
    mixed = condition_at(BASE, [Member(TUNED, weight, range(5))], 0).embeds
    torch.testing.assert_close(mixed, BASE.embeds + weight * (TUNED.embeds - BASE.embeds), rtol=1e-4, atol=1e-5)


def test_weights_must_match_and_sum_to_one() -> None:
    with pytest.raises(ValueError, match="sum to 0.5, allowed: 1"):
        mix([BASE.embeds, TUNED.embeds], [0.25, 0.25])
    with pytest.raises(ValueError, match="2 encoders but 1 weights"):
        mix([BASE.embeds, TUNED.embeds], [1.0])


def test_images_of_weight_zero_are_those_of_the_base(tiny: Path) -> None:
    guided = load(str(tiny / "pipeline")).guided(4, 3.0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    base = sample_mixture(guided, noise, BASE, [], range(4))
    assert torch.equal(sample_mixture(guided, noise, BASE, [Member(TUNED, 0.0, range(4))], range(4)), base)
    assert not torch.equal(sample_mixture(guided, noise, BASE, [Member(TUNED, 0.5, range(2, 4))], range(4)), base)
