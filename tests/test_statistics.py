"""Paired comparison: known values, honest intervals, missing scores, ties."""

import numpy as np
import pytest

from craftor.statistics import decimals, excludes_zero, holm, mean, paired, sign_flip


def test_small_case_by_hand() -> None:
    result = paired(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 2.0], [5.0, 3.0]]))
    assert (result["base"], result["tuned"], result["delta"]) == (2.5, 3.0, 0.5)
    assert result["win_rate"] == (1 + 0.5 + 1 + 0) / 4
    # Both prompts differ by 0.5 on average, so every resample gives the same mean.
    assert result["ci95"] == [0.5, 0.5]


def test_identical_scores_do_not_differ() -> None:
    scores = np.random.default_rng(0).normal(size=(50, 2))
    result = paired(scores, scores)
    assert result["delta"] == 0 and result["win_rate"] == 0.5
    assert not excludes_zero(result["ci95"])


def test_interval_has_the_width_theory_gives() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=(400, 1))
    difference = generator.normal(0.2, 1.0, size=(400, 1))
    low, high = paired(base, base + difference)["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * difference.std() / 20, rel=0.05)
    assert low < difference.mean() < high


def test_seeds_of_one_prompt_are_not_independent() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(size=(100, 1))
    tuned = base + generator.normal(size=(100, 1))
    once, four_times = paired(base, tuned), paired(base.repeat(4, axis=1), tuned.repeat(4, axis=1))
    assert np.allclose(once["ci95"], four_times["ci95"])


def test_missing_scores_are_left_out() -> None:
    base, tuned = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 1.0]]), np.array([[2.0, np.nan], [9, 9], [3.0, 2.0]])
    result = paired(base, tuned)
    assert result["base"] == pytest.approx(5 / 3) and result["delta"] == pytest.approx(2 / 3)
    assert result["win_rate"] == pytest.approx(2.5 / 3)
    assert not np.isnan(result["ci95"]).any()


def test_same_seed_same_interval() -> None:
    base, tuned = np.random.default_rng(3).normal(size=(2, 30, 2))
    assert paired(base, tuned, seed=5) == paired(base, tuned, seed=5)
    assert paired(base, tuned, seed=5)["ci95"] != paired(base, tuned, seed=6)["ci95"]


def test_many_prompts_are_resampled_in_pieces() -> None:
    base = np.zeros((30_000, 1))
    result = paired(base, base + 1, num_resamples=100)
    assert result["ci95"] == [1, 1]


@pytest.mark.parametrize(("base", "tuned"), [((2, 2), (2, 3)), ((4,), (4,))])
def test_wrong_shapes_are_refused(base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="num_prompts, num_seeds"):
        paired(np.zeros(base), np.zeros(tuned))


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="all are NaN"):
        paired(np.full((3, 2), np.nan), np.zeros((3, 2)))


@pytest.mark.parametrize(("ci95", "digits"), [((0.85, 0.97), 2), ((-0.015, 0.02), 3), ((-30, 40), 0), ((0, 0), 3)])
def test_decimals_follow_the_interval(ci95: tuple[float, float], digits: int) -> None:
    assert decimals(ci95) == digits


def test_sign_flips_find_what_is_there_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(size=(200, 2))
    noise = generator.normal(0, 0.1, size=(200, 2))
    assert sign_flip(base, base + 0.05 + noise) == pytest.approx(1 / 10_001)
    null = [sign_flip(base[:40], base[:40] + generator.normal(size=(40, 2)), num_resamples=500) for _ in range(300)]
    assert 0.02 < np.mean(np.array(null) < 0.05) < 0.09, "one in twenty, without a difference"
    assert sign_flip(base, base) == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1] and holm([]) == []


def test_a_mean_and_its_interval() -> None:
    values = np.random.default_rng(0).normal(3, 1, size=(400, 1))
    found = mean(values)
    half = 1.96 / 20
    assert found["mean"] == pytest.approx(values.mean())
    assert np.allclose(found["ci95"], [values.mean() - half, values.mean() + half], atol=0.02)
