"""The embedded default: a procedural captioned world, its referee, and a micro Stable Diffusion trained on it."""
