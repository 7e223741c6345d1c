"""The Hub, asked once before libraries ask it: they try for half a minute, and then blame a file."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import reason


def meet(name: str, file: str, revision: str | None = None) -> None:
    """Nothing where a model is in a folder, in the cache or on the Hub.

    Args:
        file: one that it must have.

    Raises:
        ValueError, OSError: the Hub cannot be reached, or has no such model or file for this user.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if Path(name).exists() or isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        raise
    except Exception as error:  # whatever its library for HTTP calls no network
        raise ConnectionError(f"the Hub cannot be reached: {reason(error)}") from error
