"""The `[workers]` section of a recipe, and which recipes can train in shards. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from craftor.object_settings import ObjectEncoder
from craftor.rollout import Section, Window
from craftor.sampled_settings import PolicyGradient, RewardWeighted
from craftor.task_settings import Denoising, RewardTuning, Tuning

Count = Annotated[int, Field(ge=1)]


class Workers(Section):
    num: Annotated[int, Field(ge=0)] | Annotated[tuple[Count, Count], Field(strict=False)] = 1
    """Or `[least, most]`: as many as the cluster has room for, when training starts and as that changes. 0 trains in
    the command's own process, where a debugger can follow; the same numbers as with one worker."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the whole model. `fsdp`: each holds a shard of what trains, of its optimiser's state
    and of the UNet, and of a block's weights the whole only while it computes; for UNets that do not fit otherwise."""
    timeout_s: float = Field(600, gt=0)
    """How long to wait for a cluster that has no room for the least number of workers."""
    resize_s: float = Field(60, gt=0)
    """How often to look whether there is room for more of them."""
    gpu: bool = False
    """One GPU for each worker."""
    threads: int = Field(1, ge=1)
    """CPU threads per worker; part of the recipe because bit-for-bit results depend on it."""

    @property
    def least(self) -> int:
        return self.num if isinstance(self.num, int) else self.num[0]

    @property
    def most(self) -> int:
        """Among how many a global batch is divided."""
        return max(1, self.processes)

    @property
    def processes(self) -> int:
        """Workers with a process of their own, at most."""
        return self.num if isinstance(self.num, int) else self.num[1]


def check_task_in_shards(task: Tuning | Denoising | ObjectEncoder) -> None:
    """Raises ValueError for a task whose workers cannot share their weights.

    They gather a block's weights together, so all must call the same blocks equally often.
    """
    if isinstance(task, ObjectEncoder):
        raise ValueError('workers.strategy = "fsdp": task.kind = "object_encoder" trains whole; allowed: ddp')
    if isinstance(task, RewardWeighted):
        raise ValueError(
            'workers.strategy = "fsdp": task.kind = "reward_weighted" makes the images that a worker lacks, and others '
            "may have theirs; allowed: ddp"
        )
    if isinstance(task, Denoising):
        return
    if not {"unet", "text_encoder_2"} & task.train.parts.keys():
        raise ValueError(
            f'workers.strategy = "fsdp": only {", ".join(task.train.parts)} trains, which is small enough for every '
            "worker to hold; allowed: ddp, or train unet or text_encoder_2"
        )
    if isinstance(task, RewardTuning):
        _check_window(task.window)
    if isinstance(task, PolicyGradient) and task.updates_per_rollout > 1:
        raise ValueError(
            f'workers.strategy = "fsdp": task.updates_per_rollout = {task.updates_per_rollout} keeps a whole copy of '
            "what trains; allowed: 1, or ddp"
        )


def _check_window(window: Window) -> None:
    drawn = [key for key in ("random_last", "sparse", "jump") if getattr(window, key) is not None]
    if drawn:
        raise ValueError(
            f'workers.strategy = "fsdp": task.window.{drawn[0]} draws each sample\'s denoising steps, and workers in '
            "step with each other must run the same ones; allowed: last, first, start with stop, steps, or ddp"
        )
    if window.recompute == "auto":
        raise ValueError(
            'workers.strategy = "fsdp": task.window.recompute = "auto" is measured by each worker for itself; allowed: '
            "true, false, a number of steps, or ddp"
        )


def check_parts_in_shards(workers: Workers, batch_size: int, micro_batch: int | None) -> None:
    """Raises ValueError where some workers would split their share of a batch into more parts than others."""
    if micro_batch is None:
        return
    for num in range(workers.least, workers.most + 1):
        shares = (batch_size // num, -(-batch_size // num))
        parts = [-(-share // micro_batch) for share in shares]
        if parts[0] != parts[1]:
            raise ValueError(
                f'workers.strategy = "fsdp": {num} workers have {shares[0]} or {shares[1]} of run.batch_size = '
                f"{batch_size} samples, which run.micro_batch = {micro_batch} makes {parts[0]} or {parts[1]} parts, "
                "and all must compute equally many; allowed: leave micro_batch out, or a fixed workers.num"
            )
