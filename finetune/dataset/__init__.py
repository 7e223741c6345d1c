"""The one loader: files and captions, which picture a step sees, and its pixels."""

from finetune.dataset.draws import Draw, Pictures
from finetune.dataset.scan import Picture, scan, split
from finetune.dataset.settings import DatasetConfig

__all__ = ["DatasetConfig", "Draw", "Picture", "Pictures", "scan", "split"]
