"""The term of inner hidden states: which layers, through which projector, how far apart.

Shapes: B batch, T tokens, N label-bearing positions, Ds and Dt hidden widths.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.kv_projector import HiddenProjector
from hf_distill.layer_mapping import Mapping, cka_mapping, describe_mapping, layer_mapping, teacher_layers
from hf_distill.losses.feature import HIDDEN_LOSSES
from hf_distill.modeling import causal_lm, evaluating, head_of, hidden_widths, num_layers, select_positions
from hf_distill.teachers import ModelTeacher
from hf_distill.teachers.local import signal_of
from hf_distill.trainers.checks import refuse_other_layers
from hf_distill.trainers.config import KDConfig

PROJECTOR = "hidden_projector"


class Run(Protocol):
    """The part of a trainer that the term needs to be set up."""

    args: Any
    student: PreTrainedModel

    def trying_out(self) -> AbstractContextManager[None]: ...

    def probe_batch(self) -> tuple[dict[str, Any], Tensor]: ...


class HiddenLayers:
    """The term that compares a student's layers with those of its teacher (`hidden_layers`, `hidden_loss`).

    As transformers counts hidden states, the last one comes after the final norm.

    Attributes:
        mapping: which layers of the teacher each of the student's learns from, with their weights.
        widths: the hidden widths of student and teacher.
        projector ([`HiddenProjector`], *optional*): where these differ.

    Args:
        run ([`Run`]): the trainer.
        teacher ([`ModelTeacher`]): its signal gets the layers that are learned from.

    Raises:
        `ValueError`: layers that do not exist, that do not give one vector per token, or vectors of several widths.
    """

    def __init__(self, run: Run, teacher: ModelTeacher) -> None:
        args: KDConfig = run.args
        self._teacher = teacher
        self._is_measured = args.hidden_layers == "cka"
        depths = [num_layers(causal_lm(side).config.get_text_config()) for side in (run.student, teacher.model)]
        mapping = self._measured(run, depths) if self._is_measured else layer_mapping(args.hidden_layers, *depths)
        self.use(mapping)
        self.distance = HIDDEN_LOSSES[args.hidden_loss]
        self._settings = f"{args.hidden_loss}, weight {args.hidden_weight:g}"
        widths = self._widths(run, mapping, teacher_layers(mapping))
        for name, found in zip(("student", "teacher"), widths, strict=True):
            if len(found) > 1:
                raise ValueError(
                    f"the {name}'s mapped layers have hidden states of widths {sorted(found)}: choose others with "
                    "hidden_layers"
                )
        self.widths = mine, theirs = tuple(found.pop() for found in widths)
        self.projector = None
        if mine != theirs:
            self.projector = HiddenProjector(mine, theirs, len(mapping)).to(args.device)

    def _measured(self, run: Run, depths: Sequence[int]) -> Mapping:
        """The mapping by CKA, on a few training rows."""
        self._widths(run, range(depths[0]), range(depths[1]))
        inputs, positions = run.probe_batch()
        self._teacher.layers = tuple(range(depths[1]))
        own = {name: value for name, value in inputs.items() if not name.startswith("teacher_")}
        with torch.no_grad(), evaluating(run.student), run.trying_out():
            mine = signal_of(run.student, head_of(run.student), own, positions, range(depths[0]))
        sides = (mine, self._teacher(inputs, positions))
        student, teacher = ([layer.cpu() for layer in (side.layers or {}).values()] for side in sides)
        return cka_mapping(student, teacher)

    def _widths(self, run: Run, layers: Iterable[int], teacher_layers: Iterable[int]) -> list[set[int]]:
        """The hidden widths after some layers of student and teacher."""
        with run.trying_out():
            student = hidden_widths(run.student, layers, "student")
        teacher = hidden_widths(causal_lm(self._teacher.model), teacher_layers, "teacher")
        return [set(student.values()), set(teacher.values())]

    def use(self, mapping: Mapping) -> None:
        """Learns from these layers of the teacher, which then are part of its signal."""
        self.mapping = mapping
        self._teacher.layers = tuple(teacher_layers(mapping))

    def resume(self, mapping: Mapping) -> None:
        """Goes on with the layers of a checkpoint; `ValueError` for others than the settings name."""
        if not self._is_measured:
            refuse_other_layers(mapping, self.mapping)
        self.use(mapping)

    def describe(self) -> str:
        """The settings, for the model card."""
        return f"{self._settings}, layers {describe_mapping(self.mapping)}"

    def loss(self, hidden_states: Sequence[Tensor], signal: Any, positions: Tensor) -> Tensor:
        """The mean over mapped layers of the distances, summed over N positions; a scalar.

        Args:
            hidden_states (sequence of `torch.Tensor` of shape `(B, T, Ds)`): the student's, embeddings first.
            signal (`TeacherSignal`): with `layers` (N, Dt).
            positions (`torch.Tensor` of shape `(N,)`): flat, of (B * T).
        """
        assert signal.layers is not None
        losses = []
        for index, (layer, sources) in enumerate(self.mapping.items()):
            student = select_positions(hidden_states[layer + 1], positions)  # (N, Ds)
            if self.projector is not None:
                student = self.projector(student, index)  # (N, Dt)
            target: Any = sum(weight * signal.layers[i].to(student.device) for i, weight in sources.items())
            mask = torch.ones(len(student), dtype=torch.bool, device=student.device)
            losses.append(self.distance(student, target, mask, num_items=1)[0])
        return torch.stack(losses).mean()
