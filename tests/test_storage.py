"""A run's home on a URL: complete or not there, through outages, full disks, a store that fails at times."""

import errno
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from craftor import checkpoint, job, storage, storage_checks
from craftor.recipe import load
from craftor.run_files import METRICS, notes
from craftor.saver import CheckpointMissed, Saver
from craftor.storage import StorageError
from craftor.worker import TrainingStopped, tell
from watched_runs import SHORT, assert_undisturbed

URL = "memory://home/run"


@pytest.fixture(autouse=True)
def empty_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


def fill(number: int):
    """What a checkpoint would hold."""

    def write(folder: Path) -> None:
        (folder / "trainer" / "state.json").write_text(json.dumps({"step": number}))

    return write


def test_a_checkpoint_is_whole_where_its_manifest_is(tmp_path: Path, empty_memory: MemoryFileSystem) -> None:
    (tmp_path / METRICS).write_text("{}\n")
    with Saver(tmp_path, URL) as saver:
        saver.save(4, fill(4))
        saver.save(8, fill(8))
    empty_memory.rm_file("/home/run/checkpoints/step-000008/manifest.json")  # as a cut-off upload leaves it
    storage.get_latest(URL, tmp_path / "elsewhere")
    last = checkpoint.latest(tmp_path / "elsewhere")
    assert last is not None and checkpoint.step_of(last) == 4
    checkpoint.verify(last)
    assert empty_memory.cat_file(f"/home/run/{METRICS}") == b"{}\n"


def test_a_store_that_fails_a_third_of_all_calls_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, failed = random.Random(3), []

    def flaky(call: Callable) -> Callable:
        def sometimes(self: MemoryFileSystem, *arguments: object, **options: object) -> object:
            if chance.random() < 0.3:
                failed.append(call)
                raise OSError(errno.EIO, "the store is away")
            return call(self, *arguments, **options)

        return sometimes

    for name in ("put_file", "exists", "glob", "find", "get_file", "makedirs", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, flaky(getattr(MemoryFileSystem, name)))
    monkeypatch.setattr(storage, "ATTEMPTS", 20)
    with Saver(tmp_path, URL) as saver:
        for step in range(1, 9):
            saver.save(step, fill(step))
    storage.get_latest(URL, tmp_path / "elsewhere")
    last = checkpoint.latest(tmp_path / "elsewhere")
    assert last is not None and checkpoint.step_of(last) == 8 and len(failed) > 10


def test_a_missed_checkpoint_is_said_and_the_next_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Saver(tmp_path, URL) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "put_file", full)
            saver.save(4, fill(4))
            saver.wait()
        saver.save(8, lambda folder: full())  # this machine's disk
        saver.save(12, fill(12))
    assert [said.count("No space left on device") for said in notes(tmp_path)] == [1, 1]
    missed = pytest.raises(CheckpointMissed, match="the checkpoint of step 16 .*No space left on device")
    with missed, Saver(tmp_path, URL) as saver:
        saver.save(16, lambda folder: full())
    last = checkpoint.latest(tmp_path)
    assert last is not None and checkpoint.step_of(last) == 12


def test_what_a_full_folder_holds_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(self: LocalFileSystem, source: str, target: str) -> None:
        Path(target).write_text("the first ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    home, failure = tmp_path / "home", tmp_path / "failure.json"
    failure.write_text(json.dumps({"message": "why it ended"}))
    storage.put(failure, f"{home}/failure.json")
    monkeypatch.setattr(LocalFileSystem, "put_file", torn)
    with pytest.raises(TrainingStopped, match="why it ended"):
        tell(failure, str(home))
    assert [path.name for path in home.iterdir()] == ["failure.json"]
    assert (home / "failure.json").read_text() == failure.read_text()


def test_a_home_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(StorageError, match=r"run.storage = 'nowhere://x': Protocol not known"):
        storage_checks.refuse_if_used("nowhere://x")
    storage_checks.refuse_if_used(URL)
    fsspec.filesystem("memory").pipe_file("/home/run/recipe.toml", b"")
    with pytest.raises(StorageError, match=f"holds another run; .* craftor train --resume {URL}"):
        storage_checks.refuse_if_used(URL)


@pytest.mark.ray
def test_a_run_outlives_an_unwritable_home(
    undisturbed: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file lies where checkpoints should go until one is missed; then it goes. Same bits, nothing saved is lost."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "checkpoints").write_text("in the way")
    miss = Saver._miss

    def miss_and_clear(self: Saver, step: int, error: BaseException) -> None:
        miss(self, step, error)
        (home / "checkpoints").unlink()

    monkeypatch.setattr(Saver, "_miss", miss_and_clear)
    job.train(load(tiny_recipe, SHORT | {"run.storage": str(home)}), tiny_recipe, tmp_path / "away")
    assert not (home / "checkpoints" / "step-000004").exists() and (home / "checkpoints" / "step-000012").exists()
    assert_undisturbed(tmp_path / "away", undisturbed)
    assert (tmp_path / "away" / METRICS).read_bytes() == (home / METRICS).read_bytes()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_run_whose_last_checkpoint_cannot_be_written_fails_by_name(tiny_recipe: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "checkpoints").write_text("in the way")
    recipe = load(tiny_recipe, {"run.num_steps": 2, "run.storage": str(home)})
    with pytest.raises(TrainingStopped, match="the checkpoint of step 2 could not be written to"):
        job.train(recipe, tiny_recipe, tmp_path / "run")
