"""A ledger proves that each sample of an epoch was used once, and one that was tampered with proves nothing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from craftor import checkpoint, cli
from craftor.ledger import Audit, Ledger, LedgerError, audit, check, expanded, ranges
from craftor.recipe import Recipe, load
from craftor.stream import slots

NUM_ROWS = 6
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    """Batches of 4."""
    return load(tiny_recipe)


def written(recipe: Recipe, closes: list[int], text: str = "") -> str:
    """The ledger of one worker that saved after each of `closes` steps."""
    book = Ledger(recipe, NUM_ROWS, [recipe.run.batch_size], text)
    for step in range(1 if not text else json.loads(text.splitlines()[-1])["steps"][1] + 1, closes[-1] + 1):
        book.note(list(range((step - 1) * recipe.run.batch_size, step * recipe.run.batch_size)))
        if step in closes:
            text = book.close(step, CPU)
    return text


def test_a_ledger_goes_on_after_a_restart(recipe: Recipe) -> None:
    text = written(recipe, [7], written(recipe, [2, 4]))
    assert [json.loads(line)["steps"] for line in text.splitlines()] == [[1, 2], [3, 4], [5, 7]]
    assert check(text, recipe, 7) == Audit(7, 28, epochs=4, remainder=4, num_rows=NUM_ROWS, workers=[1])


def change(number: int, edit: Callable[[dict], object]) -> Callable[[str], str]:
    """Edit a line as a forger would who also mends the digests below."""

    def forge(text: str) -> str:
        lines, above = [json.loads(line) for line in text.splitlines()], ""
        edit(lines[number])
        forged = []
        for line in lines:
            forged.append(json.dumps({**line, "above": above}, separators=(",", ":")))
            above = hashlib.sha256(forged[-1].encode()).hexdigest()
        return "\n".join(forged) + "\n"

    return forge


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda text: text.replace("[4,8]", "[3,7]"), "line 2 does not follow"),
        (lambda text: text.splitlines()[0] + "\n", "ends with step 2, the checkpoint is of step 4"),
        (lambda text: text.splitlines()[1] + "\n", "line 1 does not follow"),
        (change(0, lambda line: line["positions"].__setitem__(1, [3, 7])), "sample 3 of epoch 0 was used twice"),
        (change(1, lambda line: line["positions"].__setitem__(1, [13, 17])), "sample 0 of epoch 2 was not used"),
        (change(1, lambda line: line["positions"].reverse()), "step 3 used samples of another step's batch"),
        (change(1, lambda line: line["positions"].__setitem__(0, [8, 11])), "step 3 used 3 samples instead of 4"),
        (change(1, lambda line: line.update(seed=8)), "line 2 has seed 8 .* the recipe has 7"),
        (change(1, lambda line: line.update(steps=[4, 5])), "covers steps 4 to 5, but step 3 was due"),
        (change(1, lambda line: line.update(num_rows=7)), "7 samples an epoch, 6 before"),
    ],
)
def test_a_tampered_ledger_fails(recipe: Recipe, tamper: Callable[[str], str], message: str) -> None:
    text = written(recipe, [2, 4])
    check(text, recipe, 4)
    assert tamper(text) != text
    with pytest.raises(LedgerError, match=message):
        check(tamper(text), recipe, 4)


def test_audit_reads_the_newest_checkpoint_and_its_hashes(
    recipe: Recipe,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.toml").write_text(tiny_recipe.read_text())
    with pytest.raises(LedgerError, match="no complete checkpoint"):
        audit(run_dir)
    text = written(recipe, [2])
    folder = checkpoint.save(
        run_dir,
        2,
        save_module=lambda folder: (folder / "trainer" / "ledger.jsonl").write_text(text) and None,
        module=(module := torch.nn.Linear(1, 1)),
        optimizer=torch.optim.AdamW(module.parameters()),
        average=None,
        state={},
    )
    assert audit(run_dir).samples == 8
    path = folder / "trainer" / "ledger.jsonl"
    path.write_text(path.read_text().replace("[4,8]", "[4,9]"))
    monkeypatch.setattr("sys.argv", ["craftor", "audit", str(run_dir)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "ledger.jsonl: missing or changed" in said and said.count("\n") == 1


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_lose_nothing(positions: set[int]) -> None:
    pairs = ranges(np.array(list(positions)))
    assert expanded(pairs).tolist() == sorted(positions)
    assert len(pairs) == 2 * sum(position - 1 not in positions for position in positions)


@given(st.integers(1, 40), st.integers(1, 40))
def test_workers_divide_every_batch_evenly(batch_size: int, world_size: int) -> None:
    parts = [slots(batch_size, rank, world_size) for rank in range(world_size)]
    assert [slot for part in parts for slot in part] == list(range(batch_size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
