"""Craftor makes text-to-image diffusion models better by reward."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from craftor.pipeline_mixture import apply

__version__ = "0.1.0"
__all__ = ["__version__", "apply"]


def __getattr__(name: str) -> Any:
    """`craftor.apply` brings torch and diffusers, so it is imported when it is used."""
    if name != "apply":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from craftor.pipeline_mixture import apply

    return apply
