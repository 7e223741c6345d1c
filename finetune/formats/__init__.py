"""Adapter files as other programs write and read them, one file for each format."""

from finetune.formats.base import Format, formats, read, to_diffusers, write

__all__ = ["Format", "formats", "read", "to_diffusers", "write"]
