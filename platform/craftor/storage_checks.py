"""Whether a URL can be a run's home: nobody else's, writable, and seen by all nodes, before anything is trained."""

from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from craftor.storage import StorageError, failures, open_url


def refuse_if_used(url: str) -> None:
    """Raises StorageError where a run lives already, or where nothing can be written."""
    filesystem, path = open_url(url)
    try:
        if filesystem.exists(f"{path}/recipe.toml"):
            raise StorageError(
                f"run.storage = {url!r} holds another run; choose another, or go on with: craftor train --resume {url}"
            )
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(f"{path}/.probe", b"")
        filesystem.rm_file(f"{path}/.probe")
    except failures() as error:
        raise StorageError(f"run.storage = {url!r}: cannot be written: {error}") from None


def check_shared(url: str, nodes: list[dict[str, Any]]) -> None:
    """Raises StorageError naming the nodes that do not see what the driver writes there, or cannot write there."""
    filesystem, path = open_url(url)
    marker = f"{path}/.shared-{uuid4().hex}"
    try:
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(marker, b"driver")
    except failures() as error:
        raise StorageError(f"{url}: cannot be written: {error}") from None
    probes = {
        node["NodeManagerAddress"]: ray.remote(_probe)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(url, marker)
        for node in nodes
    }
    said = {address: ray.get(probe) for address, probe in probes.items()}
    filesystem.rm_file(marker)
    if wrong := {address: reason for address, reason in said.items() if reason}:
        raise StorageError(
            f"{url} is not shared by all nodes: {'; '.join(f'{a}: {r}' for a, r in wrong.items())}. Give the run a "
            "home that they share: --set run.storage=s3://bucket/run, or --out a folder on NFS"
        )


def _probe(url: str, marker: str) -> str:
    """On a node: what keeps it from reading the driver's marker, or from writing one and renaming it; "" if nothing."""
    filesystem, path = open_url(url)
    own = f"{path}/.node-{uuid4().hex}"
    try:
        if filesystem.cat_file(marker) != b"driver":
            return "reads something else than the driver wrote"
        filesystem.pipe_file(own, b"node")
        filesystem.mv(own, f"{own}.moved")
        moved = filesystem.cat_file(f"{own}.moved")
        filesystem.rm_file(f"{own}.moved")
    except failures() as error:
        return f"{type(error).__name__}: {error}"
    return "" if moved == b"node" else "a renamed file has other contents"
