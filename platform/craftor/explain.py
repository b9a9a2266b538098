"""What is said of a recipe that cannot run: a pydantic validation error -> one line its author can act on."""

from typing import Any

from pydantic import BaseModel

KINDS = (
    *("reward_tuning", "policy_gradient", "reward_weighted", "direct_tuning", "denoising", "object_encoder"),
    *("prompt_engineering", "best_of"),
)
"""Discriminators of unions show up in locations; a reader of the file never wrote them there."""


class RecipeError(ValueError):
    """A recipe that cannot run; the message names the file, the key, the value and what is allowed."""


def explain(error: Any, schema: type[BaseModel]) -> str:
    """Dotted key, what is wrong, the value given; for an unknown key, the keys allowed there."""
    location = [str(part) for part in error["loc"] if part not in KINDS]
    key = ".".join(location) or "recipe"
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(_allowed_keys(location[:-1], schema))
        return f"{key}: unknown key; allowed here: {allowed}"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" (got {value!r})"
    return f"{key}: {message}{shown}"


def _allowed_keys(location: list[str], schema: type[BaseModel]) -> list[str]:
    sections = [schema]
    for part in location:
        sections = [s for section in sections for s in _subsections(section, part)] or sections
    return sorted({info.alias or name for section in sections for name, info in section.model_fields.items()})


def _subsections(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    for name, info in section.model_fields.items():
        if key in (name, info.alias):
            return _models_in(info.annotation)
    return []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
