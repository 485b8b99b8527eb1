"""What watches a run."""

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import is_trackio_available, is_wandb_available

from hf_distill.report import markdown

TITLE = "rollout/samples"


class RolloutSamplesCallback(TrainerCallback):
    """Shows every `steps` updates what has been written last: in the terminal, and in W&B, trackio or TensorBoard.

    Tokens of the teacher's own are set off, in the terminal by colour, elsewhere by `‹›`.

    Args:
        trainer (`SpeculativeKDTrainer`): the run; add the callback to it with `add_callback`.
        steps (`int`): updates between two tables.
        num_samples (`int`, *optional*): rows of a table.

    Raises:
        `ValueError`: `steps` or `num_samples` below 1, or a trainer that writes no text.
    """

    def __init__(self, trainer: Any, steps: int, num_samples: int = 4) -> None:
        if steps < 1 or num_samples < 1:
            raise ValueError(f"steps and num_samples have to be at least 1, got {steps} and {num_samples}")
        if not hasattr(trainer, "last_rows"):
            raise ValueError(f"{type(trainer).__name__} writes no text; samples need a SpeculativeKDTrainer")
        self.trainer = trainer
        self.steps = steps
        self.num_samples = num_samples

    def on_step_end(self, args, state, control, processing_class=None, **kwargs):
        if state.global_step % self.steps or not state.is_world_process_zero:
            return
        rows = [_sample(row, processing_class) for row in self.trainer.last_rows[: self.num_samples]]  # pyright: ignore
        _print(rows, f"{TITLE}, step {state.global_step}")
        plain = [
            {"step": state.global_step, "source": source, "prompt": prompt, "completion": _plain(parts)}
            for source, prompt, parts in rows
        ]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                cells = [{k: str(v).replace("\n", "<br>").replace("|", "\\|") for k, v in row.items()} for row in plain]
                callback.tb_writer.add_text(TITLE, markdown(cells), state.global_step)
        _log_tables(args.report_to, plain)


def _sample(row: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, list[tuple[bool, str]]]:
    """Source, the student's prompt, and the completion in parts: whether a part is the teacher's own, and its text."""
    drafted = [True] * len(row.completion_ids) if row.source == "dataset" else row.drafted
    parts, end, text = [], 0, ""
    for is_draft, run in groupby(drafted):
        end += len(list(run))
        # The text of a token may depend on what is before it, and a character end only in a later part.
        longer = str(tokenizer.decode(row.completion_ids[:end]))
        longer = longer if end == len(drafted) else longer.rstrip("\ufffd")
        parts.append((not is_draft, longer[len(text) :]))
        text = longer
    return row.source, str(tokenizer.decode(row.student_prompt_ids)), parts


def _plain(parts: list[tuple[bool, str]]) -> str:
    return "".join(f"‹{text}›" if is_correction else text for is_correction, text in parts)


def _print(rows: list[tuple[str, str, list[tuple[bool, str]]]], title: str) -> None:
    view = Table("source", "prompt", "completion", title=title, title_justify="left", show_lines=True)
    for source, prompt, parts in rows:
        view.add_row(source, Text(prompt), Text.assemble(*((text, "bold red" if mine else "") for mine, text in parts)))
    Console().print(view)


def _log_tables(report_to: list[str], rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns, data = list(rows[0]), [list(row.values()) for row in rows]
    if "wandb" in report_to and is_wandb_available():
        import wandb

        if wandb.run is not None:
            wandb.log({TITLE: wandb.Table(columns=columns, data=data)}, commit=False)
    if "trackio" in report_to and is_trackio_available():
        import pandas as pd
        import trackio

        trackio.log({TITLE: trackio.Table(dataframe=pd.DataFrame(rows))})
