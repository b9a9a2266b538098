"""The second loss on an object: what it compares, whom it asks, that its gradient is right, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from craftor import object_condition
from craftor.diffuser import Diffuser, load
from craftor.object_settings import ObjectFeatures
from craftor.preflight import check
from craftor.recipe import Model, RecipeError
from craftor.stream import Rows
from craftor.tasks.noising import at, clean
from craftor.tasks.object_encoder import ObjectEncoderTask
from craftor.tasks.object_features import Unlike, box, crops
from test_object_encoder import _columns, _never, _recipe


@pytest.fixture(scope="module")
def base(tiny: Path) -> Diffuser:
    return load(Model(path=str(tiny / "pipeline")))


@pytest.fixture(scope="module")
def unlike(tiny: Path, base: Diffuser) -> Unlike:
    return Unlike(ObjectFeatures(weights=str(tiny / "clip"), weight=1.0), base)


def latents(seed: int, num: int = 3) -> Tensor:
    return torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def spot(num: int = 3) -> Tensor:
    """An object on some of the cells."""
    masks = torch.zeros(num, 8, 8)
    masks[:, 2:5, 1:7] = 1
    return masks


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_right_prediction_implies_the_clean_latents(base: Diffuser, predicts: str) -> None:
    base.scheduler.register_to_config(prediction_type=predicts)
    wanted, timesteps = latents(0), torch.tensor([10, 400, 900])
    noised = at(base, wanted, latents(1), timesteps)
    torch.testing.assert_close(clean(base, noised, noised.target), wanted, rtol=0, atol=1e-4)
    base.scheduler.register_to_config(prediction_type="epsilon")


def test_what_is_as_it_should_be_is_not_unlike_and_who_is_not_asked_has_none(unlike: Unlike) -> None:
    wanted, other = latents(0), latents(1)
    asked = torch.tensor([True, True, False])
    assert unlike(wanted, wanted, spot(), asked).abs().max() < 1e-6
    found = unlike(other, wanted, spot(), asked)
    assert (found[:2] > 1e-4).all() and found[2] == 0
    nowhere = spot()
    nowhere[0] = 0
    assert unlike(other, wanted, nowhere, asked).count_nonzero() == 1, "no object, nothing to compare"


def test_only_the_object_counts_and_not_where_it_is() -> None:
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures[1, :, 12:24, 16:28] = pictures[0, :, 8:20, 8:20]
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:20, 8:20] = masks[1, 12:24, 16:28] = 1
    one, other = crops(pictures, masks)
    torch.testing.assert_close(one, other)
    masks[1, 12:16, 16:20] = 0
    assert (crops(pictures, masks)[1][:, :9, :9] == object_condition.NEUTRAL).all(), "what is not it is filled"


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((2, 5), (1, 7), (0, 6, 1, 7)),
        ((0, 2), (0, 2), (0, 2, 0, 2)),
        ((6, 8), (3, 8), (3, 8, 3, 8)),
        ((0, 8), (4, 6), (0, 8, 1, 9)),
    ],
)
def test_the_box_is_a_square_inside_the_picture(
    rows: tuple[int, int], columns: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    mask = torch.zeros(8, 10)
    mask[rows[0] : rows[1], columns[0] : columns[1]] = 0.8
    mask[0, 0] = max(mask[0, 0], 0.3)  # a faint edge is not part of it
    assert box(mask) == expected


def test_its_gradient_is_that_of_finite_differences(unlike: Unlike) -> None:
    x0, wanted, asked = latents(1), latents(0), torch.tensor([True, False, True])
    leaf = x0.clone().requires_grad_()
    unlike(leaf, wanted, spot(), asked).sum().backward()
    assert leaf.grad is not None and leaf.grad[1].count_nonzero() == 0
    direction = torch.nn.functional.normalize(leaf.grad, dim=None)
    near = [unlike(x0 + step * direction, wanted, spot(), asked).sum().item() for step in (-1e-2, 1e-2)]
    assert (near[1] - near[0]) / 2e-2 == pytest.approx(leaf.grad.norm().item(), rel=0.05)


def test_training_with_it(tiny: Path, tmp_path: Path) -> None:
    features = {"weights": f"{tiny}/clip", "weight": 0.5, "below": 1000}
    tasks = [
        ObjectEncoderTask(_recipe(tiny, tmp_path, dropout=_never(), **more)) for more in ({}, {"features": features})
    ]
    rows = Rows([0, 1, 2, 3], _columns())
    without, with_it = (task.step(rows) for task in tasks)
    assert "unlike" not in without and with_it["compared"].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(with_it["loss"], without["loss"] + 0.5 * with_it["unlike"])
    assert (with_it["unlike"] > 0).tolist() == [False, True, False, True]
    assert tasks[1].observe(with_it)["unlike_object"] == pytest.approx(with_it["unlike"][[1, 3]].mean().item())
    gradients = [torch.cat([p.grad.flatten() for p in task.module.parameters()]) for task in tasks]
    assert (gradients[1] - gradients[0]).abs().max() > 0
    tasks[1].assert_frozen()
    late = ObjectEncoderTask(_recipe(tiny, tmp_path, dropout=_never(), features={**features, "below": 1}))
    found = late.step(rows)
    assert found["compared"].sum() == 0 and "unlike_object" not in late.observe(found), "all are too noisy"


def test_weights_that_are_not_there_are_refused_first(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows.parquet").write_bytes(np.zeros(1).tobytes())
    recipe = _recipe(tiny, tmp_path, features={"weights": str(tmp_path / "none"), "weight": 1.0})
    with pytest.raises(RecipeError, match="task.features.weights = '.*none'"):
        check(recipe, tmp_path / "recipe.toml")
