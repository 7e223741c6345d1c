"""Teach a text-to-image diffusion model a person, a thing or a style from a few pictures."""

__version__ = "0.1.0"
