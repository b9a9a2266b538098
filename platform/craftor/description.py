"""A recipe -> what its bundle says of itself: the content of `encoder.toml`."""

from typing import Any

from craftor import __version__
from craftor.diffuser import Diffuser
from craftor.object_settings import IDENTITY
from craftor.prefix_cache import weights_digest
from craftor.recipe import ObjectEncoder, Recipe, RewardTuning, Tuning

OBJECT_ENCODER = "object_encoder"
"""What `kind` says where it is not a text encoder."""


def describe(recipe: Recipe, diffuser: Diffuser) -> dict[str, Any]:
    """The window is in timesteps, so that it means the same for any number of steps."""
    if isinstance(recipe.task, ObjectEncoder):
        return _describe_object_encoder(recipe, recipe.task, diffuser)
    assert isinstance(recipe.task, Tuning)
    told = {name: {"kind": r.kind, "weight": r.factor} for name, r in recipe.task.rewards.items() if r.weight}
    if isinstance(recipe.task, RewardTuning) and recipe.task.identity is not None:
        told[IDENTITY] = {"kind": IDENTITY, "weight": recipe.task.identity.weight}
    steps = recipe.task.acts()
    # Step i takes the latents from timestep i to the one after: the window ends where the first step outside begins.
    timesteps = [*(step.timestep for step in diffuser.guided(recipe.task.rollout).schedule), -1]
    return {
        "name": recipe.name,
        "craftor": __version__,
        "base": {"model": recipe.model.path, "text_encoder_sha256": weights_digest([diffuser.text_encoder])},
        "rewards": told,
        "window": {"first_timestep": timesteps[steps.start], "last_timestep": timesteps[steps.stop] + 1},
    }


def _describe_object_encoder(recipe: Recipe, task: ObjectEncoder, diffuser: Diffuser) -> dict[str, Any]:
    """It was made for one UNet, which its hash tells from others, and acts at every timestep."""
    return {
        "name": recipe.name,
        "kind": OBJECT_ENCODER,
        "craftor": __version__,
        "base": {
            "model": recipe.model.path,
            "text_encoder_sha256": weights_digest([diffuser.text_encoder]),
            "unet_sha256": weights_digest([diffuser.unet]),
        },
        "object": {
            "domain": task.domain,
            "image_encoder": task.image_encoder,
            "tokens": task.tokens,
            "unet": task.tuned.method if task.tuned else "frozen",
        },
        "window": {"first_timestep": diffuser.scheduler.config.num_train_timesteps - 1, "last_timestep": 0},
    }
