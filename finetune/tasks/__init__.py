"""Ways of making pictures with a text-to-image model, one file for each."""

from finetune.tasks.base import Inputs, Task, choose, tasks

__all__ = ["Inputs", "Task", "choose", "tasks"]
