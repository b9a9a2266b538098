"""`craftor serve`'s TOML file -> one frozen, fully validated `Serving`. Imports no torch."""

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from craftor.explain import explain
from craftor.recipe import Model, RecipeError
from craftor.rollout import Section

OBJECT_SLOTS = 3
"""Of a UNet call, for an image with an object that guides apart from the text."""
SIZE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})")


class EngineSettings(Section):
    """The engine inside each replica."""

    mode: Literal["strict", "fast"] = "strict"
    """`strict`: every UNet call has the same number of slots, so a seed gives the same bytes whatever else is in
    flight. `fast`: the smallest of a ladder, so a lone request is quicker, and equal up to rounding."""
    bucket: int | None = Field(None, ge=2, le=512)
    """Slots of a UNet call at most; by default where the measured cost of a slot stops falling. Bytes depend on it, so
    name it where they must be the same on every machine."""
    max_bucket: int = Field(32, ge=2, le=512)
    """The largest that is tried when `bucket` is to be measured."""
    queue_seconds: float = Field(10.0, gt=0)
    """Work that may wait, in seconds of a full engine; beyond it requests are refused with 429."""
    cached_prompts: int = Field(512, ge=2)
    threads: int = Field(1, ge=1)
    """CPU threads of one UNet call; bytes depend on it."""


class Limits(Section):
    """What one request may ask for."""

    images: int = Field(16, ge=1)
    """n times the mixtures of a sweep."""
    references: int = Field(4, ge=1, le=16)
    """Pictures of objects in one request."""
    encoders: int = Field(8, ge=0)
    """In one mixture."""
    steps: int = Field(100, ge=1, le=1000)
    guidance_scale: float = Field(30.0, ge=1)
    prompt_chars: int = Field(2000, ge=1)
    body_bytes: int = Field(2**22, ge=1024)
    """Uploaded pictures included."""
    edit_bytes: int = Field(2**24, ge=1024)
    """The same where an object's pictures are uploaded, which nobody is let do before the token is known."""
    picture_pixels: int = Field(2**24, ge=1, le=2**27)
    """Of one uploaded picture of an object; while it is made small each takes some 40 bytes, one picture at a time."""
    sizes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """`WIDTHxHEIGHT` beside the model's own size."""

    @field_validator("sizes")
    @classmethod
    def _sizes(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [size for size in sizes if not SIZE.fullmatch(size)]:
            raise ValueError(f"{wrong[0]!r}: expected WIDTHxHEIGHT in pixels, such as 512x512")
        return sizes


class Defaults(Section):
    """What a request means that does not say."""

    steps: int = Field(25, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1)
    scheduler: Literal["ddim", "euler", "dpm_solver_2m"] = "ddim"


class Token(Section):
    """One client's bearer token, by its hash alone, and what it may spend at each replica."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """`printf %s TOKEN | sha256sum`; tokens are random and long, so that a plain hash is enough."""
    requests_per_minute: int = Field(600, ge=1)
    seconds_per_minute: float = Field(600.0, gt=0)
    """Of a full engine's work."""


class Http(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    cors_origins: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Web pages elsewhere that may call; by default none but our own."""
    playground: bool = True
    url_seconds: float = Field(3600.0, gt=0)
    """How long an image asked for as a URL is kept."""
    certificate: str | None = None
    """A PEM file; with `key`, Ray Serve answers by TLS."""
    key: str | None = None

    @model_validator(mode="after")
    def _both(self) -> "Http":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        return self


class Replicas(Section):
    """Ray Serve's part: how many engines, and how far they scale."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    target_ongoing_requests: int = Field(8, ge=1)
    """Another replica is started when each has more in flight."""
    max_ongoing_requests: int = Field(1000, ge=16)
    """Above what the queue holds: the engine must see what it is to batch, and refuses by cost itself."""

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class Canary(Section):
    """A second version that a share of the callers get for a name, always the same ones."""

    source: str
    share: float = Field(gt=0, lt=1)


class Serving(Section):
    name: str = Field("craftor", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What `/v1/models` calls the model."""
    model: Model
    controlnet: str | None = None
    """A ControlNet's folder or hub id; images may then be steered by `control_image`."""
    object_encoder: str | None = None
    """A bundle's folder, or a reference into the registry, looked up as those of `encoders`: pictures of an object may
    then be sent to `/v1/images/edits`."""
    encoders: dict[str, str] = {}
    """The name a mixture uses, and where it comes from: a bundle's folder, or `name@alias`, `name/3`, `name` in the
    MLflow registry. What an alias points to is looked up again every `poll_seconds`."""
    registered: str | None = None
    """An alias: every encoder of the registry that has it is served too, under its own name, as soon as it has it."""
    canaries: dict[str, Canary] = {}
    """By the name of an encoder: `style = { source = "style@candidate", share = 0.1 }`. A mixture may also ask for
    `style#canary` by name."""
    poll_seconds: float = Field(5.0, gt=0)
    runs: str = "runs"
    """The folder of `mlflow.db`, where `MLFLOW_TRACKING_URI` is not set; images asked for as a URL lie in it too."""
    engine: EngineSettings = EngineSettings()
    limits: Limits = Limits()
    defaults: Defaults = Defaults()
    http: Http = Http()
    tokens: dict[str, Token] = {}
    """By client. Without any, everybody on this machine may ask, and nobody else."""
    replicas: Replicas = Replicas()

    @field_validator("encoders")
    @classmethod
    def _names(cls, encoders: dict[str, str]) -> dict[str, str]:
        for name in encoders:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name == "base":
                raise ValueError(f"{name!r} cannot name an encoder: letters, digits, '.', '_', '-', and not 'base'")
        return encoders

    @model_validator(mode="after")
    def _canaries_have_a_mine(self) -> "Serving":
        if unknown := self.canaries.keys() - self.encoders.keys():
            raise ValueError(f"canaries: no encoder {min(unknown)!r}; there are: {', '.join(self.encoders) or 'none'}")
        return self

    @model_validator(mode="after")
    def _compiles_one_network(self) -> "Serving":
        # With and without residuals or an object's tokens a compiled UNet is several, whose bits need not agree.
        for key in ("controlnet", "object_encoder"):
            if self.model.compile and getattr(self, key) is not None:
                raise ValueError(f"model.compile = true: not with {key}; allowed there: false")
        return self

    @model_validator(mode="after")
    def _holds_an_object(self) -> "Serving":
        engine = self.engine
        for key, size in (("bucket", engine.bucket), ("max_bucket", engine.max_bucket)):
            if self.object_encoder is not None and size is not None and size < OBJECT_SLOTS:
                raise ValueError(f"engine.{key} = {size}: with an object_encoder at least {OBJECT_SLOTS}")
        return self

    @model_validator(mode="after")
    def _guarded(self) -> "Serving":
        host = self.http.host
        local = host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
        if not local and not self.tokens:
            raise ValueError(f"http.host = {host!r} is open to others, and tokens is empty: give at least one token")
        return self


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def load(path: Path) -> Serving:
    """Read a serving file. Raises `RecipeError` naming file, key, value and what is allowed."""
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    return parse(data, str(path))


def parse(data: dict[str, Any], where: str) -> Serving:
    """The same from a table, as Ray Serve's own config carries it."""
    try:
        return Serving.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {explain(e, Serving)}" for e in error.errors())) from None
