"""The progress of a run in a notebook. To be imported there alone: it needs IPython."""

from collections.abc import Mapping
from typing import Any

from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from hf_distill.metric_names import brief

# Values of a log that say nothing about the student.
LEFT_OUT = ("epoch", "learning_rate", "grad_norm", "num_tokens", "runtime", "per_second")


def telling(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a log that a table of the run shows: `loss`, `kd`, `agreement`; `eval_kd` of an evaluation."""
    if "train_runtime" in logs:  # the last log sums up
        return {}
    return brief({name: value for name, value in logs.items() if not name.endswith(LEFT_OUT)})


class MetricTable(NotebookProgressCallback):
    """A bar, and a table of the metrics under their own names.

    That of transformers shows the loss alone until something is evaluated, and then other names. It also removes the
    times from what `evaluate` returns.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.training_tracker = NotebookTrainingTracker(state.max_steps, ["Step"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_tracker is not None and (values := telling(logs or {})):
            self.training_tracker.write_line({"Step": state.global_step, **values})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.training_tracker is not None:
            self.training_tracker.remove_child()
        self.prediction_bar = None
