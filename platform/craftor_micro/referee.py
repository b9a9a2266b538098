"""The exact scorer: images in [0, 1] -> what is in them, and whether that is what a description claims.

A small convolutional classifier trained on clean renders alone. It shares no weight, seed or image with any reward,
so a model that only fools its rewards gains nothing here. Two objects are ambiguous ("A above B" is "B below A"), so
it reads them in a canonical order: slot 0 is the upper or the left object, the relation is `above` or `left of`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from craftor_micro.captions import Description, ObjectClaim
from craftor_micro.world import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    QUALITY_FACTORS,
    QUALITY_WEIGHTS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scenes,
)

ATTRIBUTES = ("count", "shape", "colour", "size", "position", "background", "texture")
CANONICAL_RELATIONS = ("above", "left of")
_INVERSE = {"below": "above", "right of": "left of"}
HEADS = {
    "count": 2,
    "shape0": len(SHAPES),
    "shape1": len(SHAPES),
    "colour0": len(COLOURS),
    "colour1": len(COLOURS),
    "size0": len(SIZES),
    "size1": len(SIZES),
    "position": len(POSITIONS),
    "relation": len(CANONICAL_RELATIONS),
    "background": len(BACKGROUNDS),
    "texture": len(TEXTURES),
    "quality": len(QUALITY_FACTORS),
}


@dataclass(frozen=True)
class Reading:
    """What the referee sees in each image, as complete canonical descriptions, and the true quality in [0, 10]."""

    descriptions: list[Description]
    factors: Float[Tensor, "b 3"]
    """Estimated quality factors in [0, 1], in the order of `world.QUALITY_FACTORS`."""
    quality: Float[Tensor, " b"]


class Referee(nn.Module):
    """Convolutions down to 4x4 cells, kept apart (what is where matters), a hidden layer, and a linear one of heads."""

    def __init__(self, widths: Sequence[int] = (32, 48, 64, 96, 96), hidden: int = 88) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.settings = {"widths": list(widths), "hidden": hidden}
        self.features = nn.Sequential(
            *block(3, a, kernel=4, stride=2),  # 32x32
            *block(a, b, kernel=3, stride=2),  # 16x16
            *block(b, c, kernel=3, stride=1),
            *block(c, d, kernel=3, stride=2),  # 8x8
            *block(d, e, kernel=3, stride=2),  # 4x4
        )
        self.hidden = nn.Linear(e * 16, hidden)
        self.heads = nn.Linear(hidden, sum(HEADS.values()))

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> dict[str, Float[Tensor, "b _"]]:
        cells = self.features((images - 0.5) * 4).flatten(1)
        outputs = self.heads(F.relu(self.hidden(cells)))
        return dict(zip(HEADS, outputs.split(list(HEADS.values()), dim=1), strict=True))

    @staticmethod
    def load(folder: str | Path) -> "Referee":
        """Frozen, in float32, from `config.json` and `model.safetensors` (stored in half precision)."""
        folder = Path(folder)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"no referee in '{folder}': expected config.json and model.safetensors; "
                f"make them with `python -m craftor_micro.build referee --out {folder}`"
            )
        referee = Referee(**json.loads((folder / "config.json").read_text()))
        referee.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return referee.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings) + "\n")
        floats = {k: v for k, v in self.state_dict().items() if v.is_floating_point()}
        save_file({k: v.half().contiguous() for k, v in floats.items()}, folder / "model.safetensors")

    @torch.no_grad()
    def read(self, images: Float[Tensor, "b 3 64 64"]) -> Reading:
        """The likeliest attributes of every image."""
        outputs = self(images)
        factors = outputs["quality"].clamp(0, 1)
        best = {name: outputs[name].argmax(1).tolist() for name in HEADS if name != "quality"}
        descriptions = [_description({name: values[i] for name, values in best.items()}) for i in range(len(images))]
        return Reading(descriptions, factors, 10 * factors @ factors.new_tensor(QUALITY_WEIGHTS))

    def judge(
        self, images: Float[Tensor, "b 3 64 64"], descriptions: Sequence[Description]
    ) -> dict[str, Float[Tensor, " b"]]:
        """Per image 1 or 0 for each of `ATTRIBUTES`, NaN where its description does not mention it.

        `accuracy` is 1 where everything mentioned is right; `quality` is the true quality in [0, 10]. Claims are
        compared under the best assignment to the objects seen; a claimed object that is missing is wrong in every
        attribute claimed of it, and with a wrong count the position is wrong too.
        """
        if len(images) != len(descriptions):
            raise ValueError(f"{len(images)} images but {len(descriptions)} descriptions; one description per image")
        reading = self.read(images)
        verdicts = [compare(seen, said) for seen, said in zip(reading.descriptions, descriptions, strict=True)]
        scores = {name: torch.tensor([v[name] for v in verdicts], dtype=torch.float32) for name in ATTRIBUTES}
        said = torch.stack(list(scores.values()))
        scores["accuracy"] = ((said == 1) | said.isnan()).all(0).float()
        return {**scores, "quality": reading.quality.float()}


def compare(seen: Description, said: Description) -> dict[str, float]:
    """1, 0 or NaN (not mentioned) for each of `ATTRIBUTES`; `seen` is complete."""
    verdicts = [_compare_in_order(seen, said, *order) for order in _orders(said)]
    return max(
        verdicts, key=lambda v: (sum(v[k] == 1 for k in ("shape", "colour", "size")), v["matches"], v["position"] == 1)
    )


def canonical(description: Description) -> Description:
    """The same claim with the upper or left of two objects first."""
    if description.layout not in _INVERSE:
        return description
    return Description(
        description.objects[::-1], _INVERSE[description.layout], description.background, description.texture
    )


Claims = tuple[ObjectClaim | None, ...]


def _orders(said: Description) -> list[tuple[Claims, str | None]]:
    """The claimed objects in either order, the relation turned with them."""
    if len(said.objects) == 1:
        # The one claimed object may be either of two that are seen.
        return [(said.objects, said.layout), ((None, *said.objects), said.layout)]
    first = canonical(said)
    inverse = {"above": "below", "left of": "right of", None: None}[first.layout]
    return [(first.objects, first.layout), (first.objects[::-1], inverse)]


def _compare_in_order(seen: Description, said: Description, claims: Claims, layout: str | None) -> dict[str, float]:
    """Claimed object i against seen object i; a `None` claims nothing of the seen object in its place."""
    pairs = [(seen.objects[i] if i < len(seen.objects) else None, o) for i, o in enumerate(claims) if o is not None]
    count_right = len(seen.objects) == len(pairs)
    verdict = {"count": float(count_right)}
    matches = 0
    for name in ("shape", "colour", "size"):
        said_of_each = [(have, getattr(o, name)) for have, o in pairs if getattr(o, name) is not None]
        right = [have is not None and getattr(have, name) == value for have, value in said_of_each]
        matches += sum(right)
        verdict[name] = float(all(right)) if right else math.nan
    verdict["matches"] = matches
    verdict["position"] = math.nan if layout is None else float(count_right and seen.layout == layout)
    verdict["background"] = math.nan if said.background is None else float(seen.background == said.background)
    verdict["texture"] = math.nan if said.texture is None else float(seen.texture == said.texture)
    return verdict


def targets(scenes: Scenes) -> dict[str, Int[Tensor, " b"]]:
    """Canonical class indices for every head but quality; meaningless where `count` says that the head is unused."""
    two = scenes.count == 2
    turned = (two & (scenes.layout % 2 == 1)).long()[:, None]  # "below" and "right of" have odd indices
    order = torch.cat([turned, 1 - turned], dim=1)
    columns = {"count": scenes.count - 1, "background": scenes.background, "texture": scenes.texture}
    for name in ("shape", "colour", "size"):
        columns[f"{name}0"], columns[f"{name}1"] = getattr(scenes, name).gather(1, order).unbind(1)
    return {
        **columns,
        "position": torch.where(two, 0, scenes.layout),
        "relation": torch.where(two, scenes.layout // 2, 0),
    }


def _description(best: dict[str, int]) -> Description:
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    objects = tuple(
        ObjectClaim(SHAPES[best[f"shape{i}"]], colours[best[f"colour{i}"]], SIZES[best[f"size{i}"]])
        for i in range(best["count"] + 1)
    )
    layout = CANONICAL_RELATIONS[best["relation"]] if best["count"] == 1 else POSITIONS[best["position"]]
    return Description(objects, layout, backgrounds[best["background"]], TEXTURES[best["texture"]])


def block(inputs: int, outputs: int, *, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


assert RELATIONS == ("above", "below", "left of", "right of"), "targets() relies on this order"
