"""The progress of a run in a notebook. To be imported there alone: it needs IPython."""

from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from hf_distill.metric_names import telling


class MetricTable(NotebookProgressCallback):
    """A bar, and a table of the metrics under their own names.

    That of transformers shows the loss alone until something is evaluated, and then other names. It also removes the
    times from what `evaluate` returns.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.training_tracker = NotebookTrainingTracker(state.max_steps, ["Step"])
        for entry in state.log_history:  # of a resumed run
            self._write({name: value for name, value in entry.items() if name != "step"}, entry["step"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._write(logs or {}, state.global_step)

    def _write(self, logs, step):
        # The last log of a run sums up.
        if self.training_tracker is not None and "train_runtime" not in logs:
            self.training_tracker.write_line({"Step": step, **telling(logs)})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.training_tracker is not None:
            self.training_tracker.remove_child()
        self.prediction_bar = None
