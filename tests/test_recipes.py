"""Every shipped recipe of a real model takes two steps, on tiny stand-ins for its model and rewards."""

from pathlib import Path

import numpy as np
import pytest
import torch

from craftor.recipe import Recipe
from craftor.recipe import load as load_recipe
from craftor.stream import Rows
from craftor.tasks import build

RECIPES = sorted(
    path for path in (Path(__file__).parents[1] / "recipes").glob("*.toml") if not path.stem.startswith("micro")
)
PROMPTS = ["a small red star", "a large blue ring"]


def stand_in(path: Path, tiny: Path) -> Recipe:
    """The recipe with tiny weights of the same families; window, parts and optimiser stay."""
    data = load_recipe(path).model_dump(by_alias=True)
    data["model"]["path"] = str(tiny / ("sdxl" if "xl" in data["model"]["path"] else "pipeline"))
    data["model"]["text_encoder"] = data["model"]["text_encoder"] and str(tiny / "pipeline")
    for reward in data["task"]["rewards"].values():
        kind = reward["kind"] if reward["kind"] in ("clip_score", "pick_score") else "pick_score"
        reward |= {"kind": kind, "weights": str(tiny / ("clip" if kind == "clip_score" else "pick"))}
    if data["task"]["kind"] == "policy_gradient":  # every step of which carries gradient
        data["task"]["rollout"]["num_steps"] = 4
    return Recipe.model_validate(data)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps(path: Path, tiny: Path) -> None:
    recipe = stand_in(path, tiny)
    task = build(recipe)
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.optimizer.lr)
    before = [p.detach().clone() for p in parameters]
    ids = {name.replace("text_encoder", "input_ids"): i.numpy() for name, i in task.diffuser.tokenize(PROMPTS).items()}
    for step in range(2):
        optimizer.zero_grad()
        rows = Rows([2 * step, 2 * step + 1], {**ids, "prompt": np.array(PROMPTS, dtype=object)})
        metrics = task.step(rows)
        assert metrics["loss"].isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
    task.assert_frozen()
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
