"""Which samples each step has, and which of them are a process's."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.dataset import Draw, Pictures
from finetune.dataset.buckets import Shapes
from finetune.errors import UserError
from finetune.schedule import TrainConfig


class Shares:
    """The samples of each step, shared among its parts and the processes.

    They are numbered over all of them, so the same recipe sees the same pictures and noise on one process or on many.

    Args:
        prior: what keeps the class in place, as many of it as of the concept in each step.
        multiple: of pixels, that sides are of.

    Raises:
        UserError: there is not as much for each.
    """

    def __init__(
        self,
        concept: Pictures,
        prior: Pictures | None,
        config: TrainConfig,
        multiple: int,
        process: int = 0,
        num_processes: int = 1,
    ):
        self.config = config
        self.process = process
        parts = num_processes * config.accumulate
        if config.batch_size % parts:
            raise UserError(
                f"train.batch_size: {config.batch_size} pictures cannot be shared by {num_processes} "
                f"processes with accumulate {config.accumulate}. Make it a multiple of {parts}."
            )
        self.size = config.batch_size // parts  # of the concept's samples in a part
        self.sources = _shaped(concept, prior, multiple, config.batch_size)

    def draw(self, step: int) -> list[list[Draw]]:
        """A step's samples over all processes: the concept's, and as many of the prior's if there is one."""
        positions = range(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        return [[source.draw(self.config.seed, position) for position in positions] for source in self.sources]

    def mine(self, draws: list[list[Draw]]) -> list[list[Draw]]:
        """This process's share of a step, part by part."""
        first = self.process * self.config.accumulate
        places = [(first + part) * self.size for part in range(self.config.accumulate)]
        return [[draw for half in draws for draw in half[place : place + self.size]] for place in places]

    def all_mine(self, first: int) -> Iterator[Draw]:
        """All samples of this process from a step on."""
        steps = range(first, self.config.steps)
        return (draw for step in steps for part in self.mine(self.draw(step)) for draw in part)


def _shaped(concept: Pictures, prior: Pictures | None, multiple: int, batch_size: int) -> list[Pictures]:
    """Both halves in the concept's shapes, so that they go through the denoiser together."""
    sources = [source for source in (concept, prior) if source is not None]
    if not concept.config.buckets:
        return sources
    shapes = Shapes(concept.rows, concept.config.resolution, multiple, batch_size)
    return [source.within(shapes) for source in sources]
