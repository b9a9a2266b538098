"""Craftor makes text-to-image diffusion models better by reward."""

__version__ = "0.1.0"
