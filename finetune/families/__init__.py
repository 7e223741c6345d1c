"""Frozen text-to-image models, one file for each architecture."""

from finetune.families.base import Family, Prompt, families

__all__ = ["Family", "Prompt", "families"]
