"""Start or join Ray, quietly: our one live line instead of its logs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def ray_session(num_workers: int) -> Iterator[None]:
    """Join the cluster of `RAY_ADDRESS` (or of the submitted job), else start one here for the time of the block.

    A local cluster gets a few logical CPUs beyond the workers' for Ray Data's light stages.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    if "RAY_ADDRESS" not in os.environ:
        # Ray Data's actors make the core worker print an error about restarts that has no effect here.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Nobody preempts a node of one's own machine, and a watcher is one more process that imports all of Ray Train.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray
    import ray.data

    from craftor.quiet import held_stderr, hush

    hush()
    started_here = not ray.is_initialized()
    if started_here:
        local = "RAY_ADDRESS" not in os.environ
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


def _worker_environment() -> dict[str, str]:
    """Offline hubs stay offline in the workers, and an uninstalled checkout is importable there."""
    passed = ("HF_HUB_OFFLINE", "HF_HOME", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM")
    environment = {name: os.environ[name] for name in passed if name in os.environ}
    roots = [
        str(Path(spec.origin).parents[1])
        for name in ("craftor", "craftor_rewards")
        if (spec := find_spec(name)) and spec.origin
    ]
    environment["PYTHONPATH"] = os.pathsep.join([*dict.fromkeys(roots), os.environ.get("PYTHONPATH", "")]).strip(
        os.pathsep
    )
    return environment
