"""Held-out objects asked into new scenes, and what independent scorers read in the pictures of them.

The identity scorer says which object is there, the referee what the prompt asked for beside it: size, position,
background and texture. Neither shares anything with an encoder, and neither saw these identities or pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from craftor import seeds
from craftor.locate import locate
from craftor_micro.captions import Description, describe
from craftor_micro.identity import IdentityScorer
from craftor_micro.identity_training import draw_identities
from craftor_micro.object_render import cut_out, render_views
from craftor_micro.objects import Views, near_identical, sample_views, scene_captions
from craftor_micro.referee import Referee

BATCH = 25
SAID = ("size", "position", "background", "texture")
"""What a prompt asks for; the shape is part of the identity, and its colours no prompt names."""
PLACES = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
Scores = Mapping[str, np.ndarray]
"""One number a picture by metric; NaN where there is none."""


@dataclass(frozen=True)
class Asked:
    """An object by another view of it, and the scene that it is asked into, one a row."""

    views: Views
    """The object in the scene: what would be exactly right."""
    others: Views
    references: Float[Tensor, "n 3 64 64"]
    """The other views, cut out."""
    prompts: list[str]
    noise: Float[Tensor, "n c h w"]

    def __len__(self) -> int:
        return len(self.views)


def asked(num: int, per_object: int, seed: int, latent_shape: tuple[int, int, int]) -> Asked:
    """`num` held-out identities, each into `per_object` scenes from one reference."""
    identity = draw_identities(num, seed, held_out=True)
    others = sample_views(identity, seed + 2)
    row = torch.arange(num).repeat_interleave(per_object)
    views = sample_views(identity[row], seed + 1)
    return Asked(
        views,
        others[row],
        cut_out(render_views(others, seed + 1))[row],
        scene_captions(views, seed + 2),
        seeds.normal(seed, range(len(row)), "drawn", latent_shape),
    )


def in_batches(draw: Callable[[Tensor], Tensor], num: int) -> Float[Tensor, "n 3 64 64"]:
    """`draw` of row numbers -> pictures, some at a time."""
    return torch.cat([draw(rows) for rows in torch.arange(num).split(BATCH)]).clamp(0, 1)


class Judges:
    """The scorers, loaded once."""

    def __init__(self) -> None:
        self.identity = IdentityScorer.load(locate("micro:identity"))
        self.referee = Referee.load(locate("micro:referee"))

    @torch.no_grad()
    def __call__(self, made: Float[Tensor, "n 3 64 64"], of: Asked) -> Scores:
        """`identity` (all its attributes), each attribute, `near_identical` (nearer to its reference than to one of
        nearly the same object), `prompt` and its parts, and what was copied of the reference where the prompt asks
        for another: `copied_position`, `copied_background`."""
        described = [_without_colour(description) for description in describe(of.views.scenes)]
        negatives = cut_out(render_views(near_identical(of.others, 3), 1))
        judged = self.referee.judge(made, described)
        read = self.referee.read(made).descriptions
        shown = describe(of.others.scenes)
        return {
            **{name: values.numpy() for name, values in self.identity.judge(made, of.views.attributes()).items()},
            "near_identical": (self.identity.same(made, of.references) > self.identity.same(made, negatives))
            .float()
            .numpy(),
            "prompt": torch.stack([judged[name] == 1 for name in SAID]).all(0).float().numpy(),
            **{f"prompt_{name}": judged[name].numpy() for name in SAID},
            "copied_position": _copied(read, described, shown, "layout"),
            "copied_background": _copied(read, described, shown, "background"),
        }

    def position_correlation(self, made: Float[Tensor, "n 3 64 64"], of: Asked) -> float:
        """Of the object's place in pictures whose prompt says nothing of it, with its place in the reference."""
        places = [
            np.array([PLACES.get(description.layout or "center", (0, 0)) for description in descriptions]).T.ravel()
            for descriptions in (self.referee.read(made).descriptions, describe(of.others.scenes))
        ]
        return float(np.corrcoef(*places)[0, 1])


def without_position(of: Asked) -> Asked:
    """The same with prompts silent about where."""
    said = (replace(_without_colour(d), layout=None) for d in describe(of.views.scenes))
    return replace(of, prompts=[_plain(description) for description in said])


def _plain(description: Description) -> str:
    (claim,) = description.objects
    return f"a {claim.size} {claim.shape} on a {description.texture} {description.background} background"


def _copied(
    read: Sequence[Description], said: Sequence[Description], shown: Sequence[Description], key: str
) -> np.ndarray:
    rows = zip(read, said, shown, strict=True)
    return np.array(
        [
            float(getattr(seen, key) == getattr(reference, key))
            if getattr(prompt, key) != getattr(reference, key)
            else np.nan
            for seen, prompt, reference in rows
        ]
    )


def _without_colour(description: Description) -> Description:
    return replace(description, objects=(replace(description.objects[0], colour=None),))
