"""What `[evaluation]` and `[validation]` ask of the rest of a recipe. Imports no torch."""

from craftor.baselines.settings import BestOf
from craftor.object_settings import ObjectEncoder
from craftor.run_settings import Evaluation
from craftor.task_settings import Denoising, Tuning
from craftor.workers import Workers


def check_evaluation(evaluation: Evaluation, task: Tuning | Denoising | ObjectEncoder) -> None:
    """Raises ValueError for methods that choose by no reward, and where nothing tuned or no diversity would be seen."""
    rewards = task.rewards if isinstance(task, Tuning) else {}
    for name, method in evaluation.methods.items():
        if isinstance(method, BestOf) and method.by not in rewards:
            raise ValueError(f"evaluation.methods.{name}.by = {method.by!r}; allowed: {', '.join(rewards)}")
    if not isinstance(task, Tuning):
        return
    if not _has_clip(task):
        raise ValueError(
            "evaluation: the diversity of images is measured by a clip_score, and task.rewards has none; add one, "
            "with evaluation_only = true if it is not to train"
        )
    first, stop = evaluation.use_from, task.acts().stop
    if first is not None and first >= stop:
        raise ValueError(
            f"evaluation.use_from = {first}: no denoising step from there on sees the tuned encoder; allowed: 0 to "
            f"{stop - 1}"
        )


def check_validation(task: Tuning | Denoising | ObjectEncoder, workers: Workers, searches: bool) -> None:
    """Raises ValueError where checkpoints cannot be scored beside the training."""
    if not isinstance(task, Tuning):
        raise ValueError(f'validation: scores what is tuned by reward; this task is "{task.kind}"')
    if not _has_clip(task):
        raise ValueError("validation: as evaluation, it needs a clip_score in task.rewards, and there is none")
    if not workers.least:
        raise ValueError("validation: workers.num = 0, and nothing runs beside it; allowed: 1 or more")
    if searches:
        raise ValueError("validation: a search judges its trials itself; leave [validation] out")


def _has_clip(task: Tuning) -> bool:
    return any(reward.kind == "clip_score" for reward in task.rewards.values())
