"""A teacher that is no model in this process: what it says of a row comes with the batch.

It is read or asked for in `collate`, in the workers of the data loader, as tensors that are flat over the label-bearing
positions of a batch, rows in order.

Shapes: N label-bearing positions of a batch.
"""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.collators import Row
from hf_distill.teachers.columns import PREFIX, AnyDataset, own_columns
from hf_distill.teachers.local import with_own_text


class BroughtTeacher:
    """The part of such a teacher that does not depend on where its outputs come from.

    Args:
        kind: "stored" or "remote", part of the names of its tensors.
        index (`int`): its place among the teachers, part of these names, too.
        num_proc (`int`, *optional*): processes that prepare rows.
    """

    name: str
    source: str
    """The source of its outputs, for people: "a store: hidden states, float16"."""
    num_positions: int | None = None
    """Tokens of the longest text that it can read."""
    drop_long_rows = False

    @property
    def layout(self) -> str:
        """The source of the outputs, in the place of the devices that a model in this process is on."""
        return f"from {self.source}"

    def __init__(self, kind: str, *, index: int, num_proc: int | None) -> None:
        self.prefix, self.num_proc = f"{PREFIX}{kind}_{index}_", num_proc
        self.columns: tuple[str, str] | None = None  # of another text than the student's, or its own prompt's

    def bind(self, student: PreTrainedModel, accelerator: Accelerator, *, sharded: bool = False) -> None:
        """Called once, when the student is loaded. Lets each process read the rows of a stream itself.

        The tensors of a batch are flat over its positions. A process that hands out parts of batches to the others
        would cut them as if they had a row for each text.

        Raises:
            `ValueError`: the settings want one process to hand out batches.
        """
        if accelerator.dataloader_config.dispatch_batches:
            raise ValueError(
                f"dispatch_batches=True cuts what {self.name} says of a batch: remove it from accelerator_config"
            )
        accelerator.dataloader_config.dispatch_batches = False

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Rows with the tokens of their `teacher_prompt`; `ValueError` for rows without tokens."""
        if "teacher_prompt" in next(iter(dataset), {}):
            dataset = with_own_text(self, dataset, name)
        row = next(iter(dataset), {})
        if row and (column := self.columns_of(row)[0]) not in row:
            raise ValueError(
                f"the {name} dataset has no column {column!r}, which {self.name} ({self.layout}) needs of its rows: "
                "let the trainer prepare them, or give them tokens"
            )
        return dataset

    def columns_of(self, row: Row) -> tuple[str, str]:
        """The columns of tokens and labels that the teacher reads."""
        return self.columns or own_columns(row)

    def read(self, inputs: Mapping[str, Any], positions: Tensor) -> dict[str, Tensor]:
        """The tensors that `collate` has made for `positions` (N,), on their device."""
        tensors = {
            name.removeprefix(self.prefix): tensor.to(positions.device)
            for name, tensor in inputs.items()
            if name.startswith(self.prefix)
        }
        found = len(next(iter(tensors.values()), ()))
        if found != len(positions):
            raise ValueError(
                f"a batch has {len(positions)} label-bearing positions, and {self.name} ({self.layout}) has said "
                f"something about {found} of its rows: a collator or transform has changed rows after they were "
                "prepared; prepare them before"
            )
        return tensors
