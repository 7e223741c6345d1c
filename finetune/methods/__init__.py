"""What to train in a frozen model, one file for each method. Importing one imports no torch."""

from finetune.methods.base import Method, methods

__all__ = ["Method", "methods"]
