"""A run's home on a URL that every node reaches (`run.storage`), and the driver's folder as its mirror.

Training workers then share no disk with the driver: they write to a folder of their own, and what is complete there
goes to the URL. A checkpoint's manifest goes last, so that a checkpoint is whole where its manifest is; object stores
have no rename. Any fsspec URL will do: `s3://bucket/run`, `gs://…`, `file:///mnt/nfs/run`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from craftor.checkpoint import MANIFEST, folder_name
from craftor.recipe import Recipe

SMALL = ("recipe.toml", "run.json", "metrics.jsonl", "failure.json", "guard.json", "notes.jsonl")
FOLDERS = ("rows", "tokenizer", "tokenizer_2", "samples")
PULL_SECONDS, ATTEMPTS, FIRST_PAUSE = 2.0, 6, 0.25
T = TypeVar("T")


class StorageError(ValueError):
    """A URL that cannot be what `run.storage` must be; the message says why."""


def failures() -> tuple[type[BaseException], ...]:
    """What a storage that is away, full or forbidden raises: botocore's errors are no OSError."""
    if find_spec("botocore") is None:
        return (OSError,)
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, BotoCoreError, ClientError)


def retried(call: Callable[[], T]) -> T:
    """Call again after growing pauses, some eight seconds in all, before the failure is raised."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except failures():
            time.sleep(FIRST_PAUSE * 2**attempt)
    return call()


def open_url(url: str) -> tuple[Any, str]:
    """The filesystem, without its cache of listings, and the path on it. Raises StorageError for an unknown scheme."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise StorageError(f"run.storage = {url!r}: {error}") from None
    return filesystem, path


def for_ray(run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """Where Ray Train keeps its own few files, as arguments of its `RunConfig`."""
    if recipe.run.storage is None:
        return {"storage_path": str((run_dir / "ray").resolve())}
    filesystem, path = open_url(recipe.run.storage)
    return {
        "storage_path": f"{path}/ray",
        "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)),
    }


def put(source: Path, url: str) -> None:
    """Upload a file, or a folder with its manifest last."""
    filesystem, target = open_url(url)
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == MANIFEST):
        destination = target if path == source else f"{target}/{path.relative_to(source)}"
        retried(partial(_put_file, filesystem, path, destination))


def _put_file(filesystem: Any, source: Path, target: str) -> None:
    """Whole or not at all: an object store promises that, a folder gets it by renaming."""
    filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(source), target)
        return
    begun = Path(f"{target}.part")
    try:
        filesystem.put_file(str(source), str(begun))
        begun.replace(target)
    finally:
        begun.unlink(missing_ok=True)


def put_checkpoint(folder: Path, url: str) -> None:
    """Upload a complete checkpoint; one of the same step that is there already ceases to be one first."""
    filesystem, target = open_url(f"{url}/checkpoints/{folder.name}")
    if retried(lambda: filesystem.exists(f"{target}/{MANIFEST}")):
        retried(lambda: filesystem.rm_file(f"{target}/{MANIFEST}"))
    put(folder, f"{url}/checkpoints/{folder.name}")


def put_small(run_dir: Path, url: str) -> None:
    """Upload what is read while a run goes on: metrics, verdicts, pictures."""
    for name in SMALL:
        if (run_dir / name).is_file():
            put(run_dir / name, f"{url}/{name}")
    if (run_dir / "samples").is_dir():
        put(run_dir / "samples", f"{url}/samples")


def put_run(run_dir: Path, url: str) -> None:
    """Upload what the driver has prepared."""
    put_small(run_dir, url)
    for name in FOLDERS:
        if (run_dir / name).is_dir():
            put(run_dir / name, f"{url}/{name}")


def get(url: str, folder: Path) -> None:
    """Download a folder's files into a local one, each whole or not at all, and its manifest last."""
    filesystem, source = open_url(url)
    for path in sorted(retried(lambda: filesystem.find(source)), key=lambda path: path.endswith(f"/{MANIFEST}")):
        get_file(filesystem, path, folder / path.removeprefix(source).lstrip("/"))


def get_file(filesystem: Any, source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    retried(lambda: filesystem.get_file(source, str(temporary)))
    temporary.rename(target)


def get_small(url: str, folder: Path) -> None:
    """The run's small files, as far as they are there."""
    filesystem, source = open_url(url)
    there = {path.rsplit("/", 1)[1] for path in retried(lambda: filesystem.glob(f"{source}/*.*"))}
    for name in SMALL:
        if name in there:
            get_file(filesystem, f"{source}/{name}", folder / name)


def get_latest(url: str, folder: Path) -> None:
    """The newest complete checkpoint, if there is one and it is not in the local folder already."""
    filesystem, source = open_url(url)
    complete = sorted(retried(lambda: filesystem.glob(f"{source}/checkpoints/step-*/{MANIFEST}")))
    if complete:
        name = complete[-1].rsplit("/", 2)[1]
        if not (folder / "checkpoints" / name / MANIFEST).exists():
            get(f"{url}/checkpoints/{name}", folder / "checkpoints" / name)


def discard_after(url: str, step: int) -> None:
    """Take the manifests of later steps' checkpoints away, so that nobody goes on from them."""
    filesystem, source = open_url(url)
    for manifest in retried(lambda: filesystem.glob(f"{source}/checkpoints/step-*/{MANIFEST}")):
        if manifest.rsplit("/", 2)[1] > folder_name(step):
            retried(partial(filesystem.rm_file, manifest))


def get_run(url: str, run_dir: Path) -> None:
    """All of a run but its older checkpoints, to go on with it on another machine."""
    get_small(url, run_dir)
    if not (run_dir / "recipe.toml").is_file():
        raise StorageError(f"{url}: no run to resume there (no recipe.toml)")
    for name in FOLDERS:
        get(f"{url}/{name}", run_dir / name)
    get_latest(url, run_dir)


def remove(url: str) -> None:
    """Delete a file, if it is there."""
    filesystem, path = open_url(url)
    if retried(lambda: filesystem.exists(path)):
        retried(lambda: filesystem.rm_file(path))


@contextmanager
def mirrored(url: str | None, run_dir: Path) -> Iterator[None]:
    """Follow the workers' metrics while the block runs; on leaving, fetch the rest and the last checkpoint."""
    if url is None:
        yield
        return
    done = Event()

    def follow() -> None:
        while not done.wait(PULL_SECONDS):
            try:
                get_small(url, run_dir)
            except failures():
                continue  # it is asked again, and what the run left is fetched on leaving

    thread = Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        get_small(url, run_dir)
        get(f"{url}/samples", run_dir / "samples")
        get_latest(url, run_dir)
