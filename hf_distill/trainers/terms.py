"""The protocol of a term: a part of the loss beside the signal's and the hard labels'."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.layer_mapping import Mapping as LayerMapping


class Run(Protocol):
    """The part of a trainer that terms use: to be set up, and to log more than their sum."""

    args: Any
    model: Any
    student: PreTrainedModel
    optimizer: Any

    def trying_out(self) -> AbstractContextManager[None]: ...

    def probe_batch(self) -> tuple[dict[str, Any], Tensor]: ...

    def is_logging(self, mode: str) -> bool: ...

    def add_means(self, mode: str, over: str, count: Tensor | int, **sums: Tensor) -> None: ...


class Term(Protocol):
    """A part of the loss that needs more than the teachers' signal. It is set up by its constructor.

    Attributes:
        name: of its sum in the log; the setting `{name}_weight` is its weight.
        forward: keyword arguments of the student's forward.
        projectors: its modules that are trained and saved with the student, by file name.
    """

    name: str
    forward: Mapping[str, Any]
    projectors: dict[str, nn.Module]

    def loss(
        self, outputs: Any, signal: Any, positions: Tensor, weight: float, divisor: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """`weight` * the sum over N positions / `divisor`, and the sum, for the log; scalars.

        It is called inside the student's forward.

        Args:
            outputs: those of the student's backbone.
            signal (`Signal`): the teachers'.
            positions (`torch.Tensor` of shape `(N,)`): flat, of (B * T).
        """
        ...

    def describe(self) -> dict[str, str]:
        """Its settings, for the model card."""
        ...

    def mappings(self) -> dict[str, LayerMapping]:
        """Its state: the layers that the student's learn from. Checkpoints keep them; measured ones would change."""
        ...

    def resume(self, mappings: Mapping[str, LayerMapping]) -> None:
        """Goes on with those of a checkpoint; `ValueError` for others than the settings name."""
        ...
