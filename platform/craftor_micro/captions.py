"""Scenes -> English captions, clean or as careless as the web's, and back to what a caption claims.

A `Description` is what a caption says; `None` means "not mentioned". Training captions of the base model pass
through `corrupt`, which forgets attributes and gets some wrong: that is the room reward tuning has.
"""

import random
from dataclasses import asdict, dataclass, replace

from craftor_micro.world import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, TEXTURES, Scenes

POSITION_PHRASES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
_SYNONYMS = {"large": ("large", "big"), "small": ("small", "little"), "gray": ("gray", "grey")}
_PREFIXES = ("", "", "", "a picture of ", "an image of ", "there is ")
TEMPLATE_WORDS = (
    "a",
    "an",
    "at",
    "background",
    "backdrop",
    "image",
    "in",
    "is",
    "of",
    "on",
    "picture",
    "the",
    "there",
    "with",
)


@dataclass(frozen=True)
class ObjectClaim:
    shape: str
    colour: str | None
    size: str | None


@dataclass(frozen=True)
class Description:
    """What a caption claims about an image."""

    objects: tuple[ObjectClaim, ...]
    layout: str | None
    background: str | None
    texture: str | None

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> "Description":
        return Description(**{**data, "objects": tuple(ObjectClaim(**o) for o in data["objects"])})


def describe(scenes: Scenes) -> list[Description]:
    """Complete and true descriptions of every scene."""
    shapes, colours, sizes = list(SHAPES), list(COLOURS), list(SIZES)
    backgrounds = list(BACKGROUNDS)
    columns = zip(
        scenes.count.tolist(),
        scenes.shape.tolist(),
        scenes.colour.tolist(),
        scenes.size.tolist(),
        scenes.layout.tolist(),
        scenes.background.tolist(),
        scenes.texture.tolist(),
        strict=True,
    )
    return [
        Description(
            objects=tuple(ObjectClaim(shapes[shape[i]], colours[colour[i]], sizes[size[i]]) for i in range(count)),
            layout=POSITIONS[layout] if count == 1 else RELATIONS[layout],
            background=backgrounds[background],
            texture=TEXTURES[texture],
        )
        for count, shape, colour, size, layout, background, texture in columns
    ]


def corrupt(description: Description, rng: random.Random, *, forget: float = 0.3, wrong: float = 0.12) -> Description:
    """With probability `forget` drop each optional attribute by a coin; with `wrong` replace one attribute."""
    if rng.random() < wrong:
        description = _replace_one(description, rng)
    if rng.random() < forget:
        description = Description(
            objects=tuple(
                ObjectClaim(o.shape, _maybe(o.colour, rng), _maybe(o.size, rng)) for o in description.objects
            ),
            layout=description.layout if len(description.objects) == 2 else _maybe(description.layout, rng),
            background=_maybe(description.background, rng),
            texture=_maybe(description.texture, rng),
        )
    return description


def _maybe(value: str | None, rng: random.Random) -> str | None:
    return value if rng.random() < 0.5 else None


def _replace_one(description: Description, rng: random.Random) -> Description:
    first, rest = description.objects[0], description.objects[1:]
    match rng.choice(("shape", "colour", "size", "background", "texture")):
        case "shape":
            return replace(description, objects=(replace(first, shape=rng.choice(SHAPES)), *rest))
        case "colour":
            return replace(description, objects=(replace(first, colour=rng.choice(list(COLOURS))), *rest))
        case "size":
            return replace(description, objects=(replace(first, size=rng.choice(SIZES)), *rest))
        case "background":
            return replace(description, background=rng.choice(list(BACKGROUNDS)))
        case _:
            return replace(description, texture=rng.choice(TEXTURES))


def write(description: Description, rng: random.Random) -> str:
    """One of many wordings of a description, lower case, at most 20 words."""
    prefix = rng.choice(_PREFIXES)
    phrases = [_noun_phrase((o.size, o.colour, o.shape), rng) for o in description.objects]
    if len(phrases) == 2:
        assert description.layout is not None, "two objects are always related"
        subject = f"{phrases[0]} {description.layout} {phrases[1]}"
    else:
        subject = phrases[0]
        if description.layout is not None:
            subject += f" {POSITION_PHRASES[description.layout]}"
    if description.background is None and description.texture is None:
        return prefix + subject
    noun = rng.choice(("background", "background", "background", "backdrop"))
    ground = _noun_phrase((description.texture, description.background, noun), rng)
    if rng.random() < 0.2:
        return f"{ground} with {subject}"
    return f"{prefix}{subject} on {ground}"


def _noun_phrase(words: tuple[str | None, ...], rng: random.Random) -> str:
    said = [rng.choice(_SYNONYMS.get(w, (w,))) for w in words if w is not None]
    return f"{'an' if said[0][0] in 'aeiou' else 'a'} {' '.join(said)}"


def read_claims(prompt: str) -> Description:
    """What a prompt says, in any of its wordings: the inverse of `write`.

    Raises ValueError for a word that the world lacks, and for prompts without a shape or with more than two.
    """
    words, known = prompt.lower().replace(",", " ").split(), set(vocabulary())
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"prompt {prompt!r}: the micro world has no word {unknown[0]!r}")
    meant = {synonym: word for word, synonyms in _SYNONYMS.items() for synonym in synonyms}
    words = [meant.get(word, word) for word in words]
    objects: list[ObjectClaim] = []
    size: str | None = None
    colour: str | None = None
    for word in words:
        size, colour = (word if word in SIZES else size), (word if word in COLOURS else colour)
        if word in SHAPES:
            objects.append(ObjectClaim(word, colour, size))
            size = colour = None
    if not 1 <= len(objects) <= 2:
        raise ValueError(f"prompt {prompt!r}: names {len(objects)} shapes; allowed: 1 or 2")
    text = " ".join(words)
    places = {relation: f" {relation} " for relation in RELATIONS} if len(objects) == 2 else POSITION_PHRASES
    layout = next((name for name, phrase in places.items() if phrase in text), None)
    background = next((word for word in words if word in BACKGROUNDS), None)
    texture = next((word for word in words if word in TEXTURES), None)
    return Description(tuple(objects), layout, background, texture)


def vocabulary() -> list[str]:
    """Every word a caption can hold."""
    tables = (SHAPES, COLOURS, BACKGROUNDS, SIZES, TEXTURES, TEMPLATE_WORDS, POSITIONS)
    words = {word for table in tables for entry in table for word in entry.split()}
    words |= {synonym for synonyms in _SYNONYMS.values() for synonym in synonyms}
    return sorted(words | {word for relation in RELATIONS for word in relation.split()})
