"""The term of inner hidden states: which layers, through which projector, how far apart.

Shapes: B batch, T tokens, N label-bearing positions, Ds and Dt hidden widths.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.kv_projector import HiddenProjector
from hf_distill.layer_mapping import Mapping, cka_mapping, describe_mapping, layer_mapping, teacher_layers
from hf_distill.losses.feature import HIDDEN_LOSSES
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.modeling import causal_lm, evaluating, head_of, hidden_widths, num_layers, select_positions
from hf_distill.teachers.local import BaseTeacher, LocalTeacher, signal_of

PROJECTOR = "hidden_projector"


class HiddenLayers:
    """What a student's layers learn from those of its teacher, as `hidden_layers` and `hidden_loss` say.

    As transformers counts hidden states, the last one comes after the final norm.

    Args:
        trainer ([`KDTrainer`]): with student and teacher; it gets a projector where their widths differ.

    Raises:
        `ValueError`: layers that do not exist, that do not give one vector per token or vectors of several widths, and
            an optimizer that would leave the projector out.
    """

    def __init__(self, trainer: Any) -> None:
        args, student, teacher = trainer.args, trainer.student, trainer.teacher
        configs = [causal_lm(side).config.get_text_config() for side in (student, teacher.model)]
        depths = [num_layers(config) for config in configs]
        if args.hidden_layers == "cka":
            self._widths(trainer, range(depths[0]), range(depths[1]))
            inputs, positions = trainer.probe_batch()
            view = trainer.teacher_view(inputs, positions)
            teacher.layers = tuple(range(depths[1]))
            with torch.no_grad(), evaluating(student), trainer.trying_out():
                mine = signal_of(student, head_of(student), inputs, positions, range(depths[0]))
            (found,) = teacher(*view)
            sides = ([layer.cpu() for layer in side.layers.values()] for side in (mine, found))  # pyright: ignore
            mapping = cka_mapping(*sides)  # pyright: ignore[reportArgumentType, reportCallIssue]
        else:
            mapping = layer_mapping(args.hidden_layers, *depths)
        self.use(mapping, teacher)
        trainer._tell(f"hidden states, student's layer <- teacher's: {describe_mapping(mapping)}")
        self.distance = HIDDEN_LOSSES[args.hidden_loss]
        self.projector = None
        widths = self._widths(trainer, mapping, teacher_layers(mapping))
        for name, found in zip(("student", "teacher"), widths, strict=True):
            if len(found) > 1:
                raise ValueError(
                    f"the {name}'s mapped layers have hidden states of widths {sorted(found)}: choose others with "
                    "hidden_layers"
                )
        widths = [found.pop() for found in widths]
        if widths[0] != widths[1]:
            if trainer.optimizer is not None:
                raise ValueError(
                    f"student and teacher have hidden sizes {widths[0]} and {widths[1]}, and the projector between "
                    "them would not be in an optimizer of your own: leave optimizers out"
                )
            self.projector = HiddenProjector(widths[0], widths[1], len(self.mapping)).to(args.device)
            trainer.projectors[PROJECTOR] = self.projector

    @staticmethod
    def _widths(trainer: Any, layers: Iterable[int], teacher_layers: Iterable[int]) -> list[set[int]]:
        """The hidden widths after some layers of student and teacher."""
        with trainer.trying_out():
            student = hidden_widths(trainer.student, layers, "student")
        teacher = hidden_widths(causal_lm(trainer.teacher.model), teacher_layers, "teacher")
        return [set(student.values()), set(teacher.values())]

    def use(self, mapping: Mapping, teacher: LocalTeacher | BaseTeacher) -> None:
        """Learns from these layers of the teacher, which then are part of its signal."""
        self.mapping = mapping
        teacher.layers = tuple(teacher_layers(mapping))

    def loss(self, hidden_states: Sequence[Tensor], signal: TeacherSignal, positions: Tensor) -> Tensor:
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
