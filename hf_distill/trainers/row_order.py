"""The order in which a training reads its rows, and the place in it at which a resumed run goes on."""

from transformers import TrainerState


def place_in_stream(state: TrainerState) -> tuple[int, int]:
    """The finished passes over a stream, and the updates that were made in the pass after them.

    transformers does not know how long a stream is and counts `max_steps` updates as one pass. The `epoch` of its state
    is right all the same: at each update it is the number of the pass plus (updates in this pass) / `max_steps`.

    Args:
        state (`TrainerState`): of a checkpoint, with its own run's `max_steps`.
    """
    epoch = state.epoch or 0.0
    passes = int(epoch)
    updates = round((epoch - passes) * state.max_steps)
    # A whole number: all `max_steps` updates were made in the first pass.
    return (passes, updates) if updates else (0, state.global_step)
