"""The bodies of image requests: OpenAI's fields, and ours for mixtures. Limits that are settings are in `interpret`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, populate_by_name=True, use_attribute_docstrings=True
    )


class Portion(Body):
    """An encoder's part of a mixture."""

    weight: float
    """From 0 to 1."""
    first: Annotated[int | None, Field(alias="from", ge=0, le=999)] = None
    """The noisiest timestep at which it acts; by default that of its training."""
    last: Annotated[int | None, Field(alias="to", ge=0, le=999)] = None


Mix = dict[str, float | Portion]


class Asked(Body):
    """What any request for images may say."""

    prompt: str
    model: str | None = None
    n: int | None = Field(1, ge=1)
    """How many images, with seeds that follow each other."""
    size: str | None = None
    """`WIDTHxHEIGHT`; by default, and for `auto`, the model's own."""
    response_format: Literal["b64_json", "url"] | None = None
    """`b64_json` by default; a `url` leads to the image for a while."""
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=16)
    """Previews on the way, with `stream`."""
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(None, max_length=256)

    mix: Mix = {}
    """By name of an encoder; the base has the weight that is left."""
    sweep: list[Mix] | None = Field(None, min_length=1)
    """Several mixtures instead of one, with the same seeds: n images of each."""
    negative_prompt: str = ""
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """Of the first image; image k has seed + k, and is the same one alone."""
    scheduler: Literal["ddim", "euler", "dpm_solver_2m"] | None = None
    strength: float | None = Field(None, gt=0, le=1)
    """How much of the way from noise is taken; goes with a picture to begin from, by default 0.8."""
    control_scale: float | None = Field(None, ge=0, le=2)
    """How much a `control_image` counts, by default 1."""


class Generation(Asked):
    """`POST /v1/images/generations`."""

    image: str | None = None
    """A picture to begin from (base64 of a PNG, JPEG or WebP file of the size asked for)."""
    mask: str | None = None
    """Where to draw anew (white) and where to keep the picture (black); goes with `image`."""
    control_image: str | None = None
    """A picture that the server's ControlNet reads, where it has one (a file as `image`): edges, depth, a pose."""


class Edit(Asked):
    """`POST /v1/images/edits`, but for its files, which `form` reads and documents."""

    object_weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    """How strongly the object guides, as `guidance_scale` does for the prompt and by default equal to it; 0 leaves the
    object out. Another value than `guidance_scale` takes half as much work again."""
    object_from: int | None = Field(None, ge=0)
    """The first denoising step that sees the object, by default 0: later ones leave the layout to the prompt."""
