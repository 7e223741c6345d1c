"""Keep the libraries' own chatter out of a run's output; their errors still speak."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Before the libraries are imported: they read these at import. What the user has set stands."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # several GPUs end with a warning of what the end frees
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Pictures that cannot be used are refused with words of our own.
    warnings.filterwarnings("ignore", message="Corrupt EXIF data")  # `check` names such pictures
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def quiet_loading() -> None:
    """The bars for reading a base that is on the disk already, and what is said of adapters."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # PiSSA has two on purpose
