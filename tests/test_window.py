"""Windows: which denoising steps of any rollout carry gradient, for each method of the literature."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craftor.plan import plan
from craftor.rollout import PRESETS, Window, draw
from craftor.solver import trailing

UNIT = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("window", "num_steps", "span"),
    [
        ({"last": 5}, 20, range(15, 20)),
        ({"first": 3}, 20, range(0, 3)),
        ({"start": 3, "stop": 9}, 20, range(3, 9)),
        ({"steps": [2, 7]}, 20, range(2, 8)),
        ({"last": 5, "of": 25}, 25, range(20, 25)),
        ({"last": 5, "of": 25}, 50, range(40, 50)),
        ({"last": 5, "of": 25}, 20, range(16, 20)),
        ({"random_last": [1, 4]}, 20, range(16, 20)),
        ({"preset": "alignprop"}, 50, range(0, 50)),
        ({"preset": "refl"}, 40, range(30, 40)),
        ({"preset": "refl"}, 20, range(15, 20)),
        ({"preset": "draft", "last": 3}, 20, range(17, 20)),
    ],
)
def test_span(window: dict, num_steps: int, span: range) -> None:
    assert Window(**window).span(num_steps) == span


def test_a_window_counted_in_other_steps_selects_the_same_timesteps() -> None:
    lowest = trailing(1000, 25)[20]
    for num_steps in (10, 20, 25, 30, 50, 100):
        timesteps = trailing(1000, num_steps)
        inside = [timesteps[index] for index in Window(last=5, of=25).span(num_steps)]
        assert inside == [timestep for timestep in timesteps if timestep <= lowest]


@given(UNIT, UNIT, st.sampled_from(sorted(PRESETS)), st.sampled_from([10, 20, 25, 40, 50]))
def test_every_draw_of_a_preset_lies_in_its_span(end: float, choice: float, preset: str, num_steps: int) -> None:
    window = Window(preset=preset)
    drawn = draw(window, num_steps, end, choice)
    assert set(drawn.steps) <= set(window.span(num_steps))
    assert drawn.end is None or drawn.end >= max(drawn.steps)


@given(UNIT)
def test_random_lengths_take_every_value_of_their_range(choice: float) -> None:
    drawn = draw(Window(random_last=(2, 4)), 10, 0.0, choice)
    assert drawn.steps == tuple(range(10 - (2 + int(choice * 3)), 10))


def test_refl_ends_right_after_the_step_that_carries_gradient() -> None:
    window = Window(preset="refl")
    drawn = [draw(window, 40, end, 0.5) for end in (0.0, 0.5, 0.999)]
    assert [(d.steps, d.end) for d in drawn] == [((30,), 30), ((35,), 35), ((39,), 39)]


def test_drtune_spreads_its_steps_before_the_jump() -> None:
    drawn = draw(Window(sparse=3, jump=(8, 8)), 10, 0.0, 0.5)
    assert drawn.steps == (1, 4, 7) and drawn.end == 8


def test_a_plan_follows_from_seed_and_sample_index() -> None:
    window = Window(preset="alignprop")
    whole = plan(window, 20, seed=5, positions=range(8))
    assert len({int(first) for first in whole.first}) > 2, "drawn per sample, not per batch"
    for position in (0, 3, 7):
        alone = plan(window, 20, seed=5, positions=[position])
        assert alone.window[0].equal(whole.window[position]) and alone.first[0] == whole.first[position]
    assert not plan(window, 20, seed=6, positions=range(8)).window.equal(whole.window)
