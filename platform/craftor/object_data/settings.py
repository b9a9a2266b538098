"""A TOML file that says where pictures of objects are and what describes them. Imports no torch."""

import re
import tomllib
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from craftor.recipe import RecipeError
from craftor.rollout import Section


class Captioner(Section):
    model: str
    """BLIP or Florence-2: a folder or hub id; or `module:attr` of your own: images in [0, 1] -> sentences."""
    max_new_tokens: int = Field(40, ge=1)


class Attributes(Section):
    """Zero-shot classifiers by CLIP: of each list at most one attribute is said."""

    model: str
    """A CLIP: a folder, a hub id, a short name of the rewards' catalogue, or `micro:NAME`."""
    template: str = "a photo of {}"
    lists: dict[str, tuple[str, ...]] = Field(min_length=1)
    """By a name of your own, what excludes each other: `place = ["indoors", "outdoors"]`."""
    least: float = Field(0.5, ge=0, le=1)
    """The probability below which a list has nothing to say."""

    @field_validator("lists", mode="before")
    @classmethod
    def _as_tuples(cls, lists: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(words) for name, words in lists.items()}

    @field_validator("lists")
    @classmethod
    def _have_choices(cls, lists: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if short := [name for name, words in lists.items() if len(words) < 2]:
            raise ValueError(f"{short[0]} has {len(lists[short[0]])} attributes; allowed: two or more")
        return lists

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError(f"{template!r}: allowed is a text with one {{}} for the attribute")
        return template


class Masks(Section):
    """Where the object is, for pictures that have no mask of their own: CLIPSeg asked for a text."""

    model: str
    outline: str | None = None
    """A SAM 2, which draws the outline of what CLIPSeg has found: by itself that is 352 pixels wide, and blurred."""
    prompt: str = "the main object"
    threshold: float = Field(0.5, gt=0, lt=1)


class ObjectData(Section):
    images: str
    """A folder with one folder for each object: `IDENTITY/NAME.png`, its mask `IDENTITY/NAME.mask.png` if it has one.
    Where a picture has transparency that is its mask."""
    kind: str = ""
    """What the objects are ("dog"): a caption that lacks the word gets it."""
    captioner: Captioner
    attributes: Attributes | None = None
    masks: Masks | None = None
    pictures_per_part: int = Field(64, ge=1)
    """So many are described at once and written together; what was being made when a run ended is made again."""


def load(path: Path) -> ObjectData:
    """Raises RecipeError naming file and key."""
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    try:
        settings = ObjectData.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{path}: {key}: {re.sub('^Value error, ', '', first['msg'])}") from None
    if not Path(settings.images).is_dir():
        raise RecipeError(f"{path}: images = {settings.images!r}: no such folder")
    return settings
