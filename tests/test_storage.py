"""A run's home on a URL: complete or not there, through outages, full disks, a store that fails at times."""

import errno
import json
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from craftor import checkpoint, job, saver, storage, storage_checks
from craftor.commands import training
from craftor.recipe import RecipeError, load
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


def test_a_checkpoint_whose_download_is_cut_off_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Saver(tmp_path, URL) as saver:
        saver.save(4, fill(4))

    def get_file(self: MemoryFileSystem, source: str, target: str) -> None:
        if source.endswith("state.json"):
            raise OSError(errno.EIO, "the store is away")
        Path(target).write_bytes(self.cat_file(source))

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", get_file)
        with pytest.raises(OSError, match="away"):
            storage.get_latest(URL, tmp_path / "elsewhere")
    assert checkpoint.latest(tmp_path / "elsewhere") is None
    storage.get_latest(URL, tmp_path / "elsewhere")
    last = checkpoint.latest(tmp_path / "elsewhere")
    assert last is not None
    checkpoint.verify(last)


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


@pytest.mark.parametrize("late", [False, True])
def test_a_full_disk_of_the_worker_costs_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Whether it is full when the tensors are written or when files are made of them; the note does not fit either."""

    def too_much(folder: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            save_file({"weight": torch.zeros(1024)}, folder / "trainer" / "module.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Saver(tmp_path, None) as held:
        with monkeypatch.context() as patch:
            patch.setattr(saver, "note", full)
            folder = held.begin(4)
            assert folder is not None
            held.end(folder, 4, fill(4) if late else too_much, too_much if late else None)
            held.wait()
        assert held.missed is not None and "File too large" in held.missed
        assert not any((tmp_path / "checkpoints").iterdir())
        held.save(8, fill(8))
    last = checkpoint.latest(tmp_path)
    assert last is not None and checkpoint.step_of(last) == 8


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


@pytest.mark.parametrize("home", [None, "memory://home/another"])
def test_a_folder_that_holds_another_run_is_not_resumed_into(
    tiny_recipe: Path, tmp_path: Path, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def home_of(folder: Path, url: str | None) -> str:
        folder.mkdir()
        job.write_recipe(load(tiny_recipe, {"run.storage": url} if url else None), folder)
        return (folder / "recipe.toml").read_text()

    home_of(tmp_path / "prepared", URL)
    storage.put_run(tmp_path / "prepared", URL)
    monkeypatch.setattr(job, "resume", lambda folder, other, accept: job.Trained(folder, folder, None, 0.0))
    occupied = home_of(tmp_path / "occupied", home)
    with pytest.raises(RecipeError, match=f"holds something else than the run at {URL}; choose another folder with"):
        training.train(resume=URL, out=tmp_path / "occupied")
    assert (tmp_path / "occupied" / "recipe.toml").read_text() == occupied
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(RecipeError, match="holds something else"):
        training.train(resume=URL, out=tmp_path / "notes")
    for _ in range(2):  # an empty folder, then its own
        training.train(resume=f"{URL}/", out=tmp_path / "new")
    assert (tmp_path / "new" / "recipe.toml").is_file()


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
