"""The order in which a training reads its rows, and the place in it at which a resumed run goes on."""

from collections.abc import Iterator

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler


def place_in_stream(state: TrainerState) -> tuple[int, int]:
    """The finished passes over a stream, and the updates that were made in the pass after them.

    transformers does not know how long a stream is and counts `max_steps` updates as one pass. The `epoch` of its state
    is right all the same: at each update it is the number of the pass plus (updates in this pass) / `max_steps`, and
    after a pass the number of the next one.

    Args:
        state (`TrainerState`): of a checkpoint, with its own run's `max_steps`.
    """
    epoch = state.epoch or 0.0
    passes = int(epoch)
    updates = round((epoch - passes) * state.max_steps)
    if updates or state.global_step < state.max_steps:
        return passes, updates
    return 0, state.global_step  # all `max_steps` updates were made in the first pass


class SeededLengthGroups(LengthGroupedSampler):
    """Rows of similar lengths side by side, in an order that depends on the seed and the epoch alone.

    The sampler of transformers draws from the global random state. After the first epoch this state depends on what the
    training has drawn, for dropout for example: each process has an order of its own then, and so has a resumed run.

    Args:
        groups (`LengthGroupedSampler`): has the lengths and the size of a group.
        seed (`int`): the same in all processes.
    """

    def __init__(self, groups: LengthGroupedSampler, seed: int) -> None:
        super().__init__(groups.batch_size, lengths=groups.lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; called before its first row is read."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
