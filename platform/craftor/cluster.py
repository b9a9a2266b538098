"""Start or join Ray, quietly: our one live line instead of its logs."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from craftor.recipe import Workers


SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    # What Ray Train believes about nodes is up to 20 s old: a group sized for one that is gone asks again, and waits no
    # minute for it. Where there is room, a group has its places in a tenth of a second.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # Notice of preemption may be as short as ten seconds.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # In a submitted job ours add to its environment, instead of being refused where both name PYTHONPATH.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
}
LOCAL_SETTINGS = {
    # Ray Data's actors make the core worker print an error about restarts that has no effect here.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Three times as many processes as may start at a time, by default one a core, and the raylet warns at length.
    "RAY_worker_maximum_startup_concurrency": str(max(16, os.cpu_count() or 1)),
    # Processes that the raylet starts beforehand have not this job's environment: nothing ever runs in them.
    "RAY_prestart_worker_first_driver": "0",
    # Nobody preempts a node of one's own machine, and a watcher is one more process that imports all of Ray Train.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Of a cluster that is started here, beside the others."""


@contextmanager
def ray_session(num_workers: int) -> Iterator[None]:
    """Join the cluster of `RAY_ADDRESS` (or of the submitted job), else start one here for the time of the block.

    A local cluster gets a few logical CPUs beyond the workers' for Ray Data's light stages.
    """
    local = "RAY_ADDRESS" not in os.environ
    with _environment(SETTINGS | (LOCAL_SETTINGS if local else {})):
        import ray
        import ray.data

        from craftor.quiet import held_stderr, hush

        hush()
        started_here = not ray.is_initialized()
        if started_here:
            with held_stderr():  # Ray reports the log level it was told
                ray.init(
                    **({"address": "local", "num_cpus": num_workers + 2, "include_dashboard": False} if local else {}),
                    logging_level="ERROR",
                    log_to_driver=False,
                    runtime_env={"env_vars": _worker_environment()},
                )
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        try:
            yield
        finally:
            if started_here:
                ray.shutdown()


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Variables for the time of the block, where nobody has set them: what is for one cluster is not for the next."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class TooFewResources(ValueError):
    """The cluster had no room for a run's least number of workers in the time it was given."""


def await_workers(workers: "Workers") -> None:
    """Wait, with a message, until the cluster has room for the least number of workers; an autoscaler is asked for it.

    Raises TooFewResources after `workers.timeout_s`.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    wanted = {"GPU": workers.least} if workers.gpu else {"CPU": workers.least}
    (name, amount), deadline, said = *wanted.items(), time.monotonic() + workers.timeout_s, False
    while (there := ray.cluster_resources().get(name, 0)) < amount:
        if not said:
            print(
                f"waiting for {amount} {name}s: the cluster has {there:g} (workers.timeout_s = {workers.timeout_s:g})"
            )
            request_resources(bundles=[{"CPU": 1, **{name: 1}}] * workers.least)
            said = True
        if time.monotonic() > deadline:
            raise TooFewResources(
                f"workers.num = {workers.num} wants {amount} {name}s at least; the cluster has {there:g} after "
                f"{workers.timeout_s:g} s (workers.timeout_s); allowed: a smaller workers.num, or [least, most]"
            )
        time.sleep(1)
    if said:
        request_resources(bundles=[])


def alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _worker_environment() -> dict[str, str]:
    """Offline hubs stay offline in the workers, and an uninstalled checkout is importable there."""
    passed = ("HF_HUB_OFFLINE", "HF_HOME", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM")
    environment = {name: os.environ[name] for name in passed if name in os.environ}
    roots = [
        str(Path(spec.origin).resolve().parents[1])
        for name in ("craftor", "craftor_rewards")
        if (spec := find_spec(name)) and spec.origin
    ]
    environment["PYTHONPATH"] = os.pathsep.join([*dict.fromkeys(roots), os.environ.get("PYTHONPATH", "")]).strip(
        os.pathsep
    )
    return environment
