"""The term of inner hidden states: which layers, through which projector, how far apart.

Shapes: B batch, T tokens, N label-bearing positions, Ds and Dt hidden widths.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.kv_projector import HiddenProjector
from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import cka_mapping, describe_mapping, layer_mapping, teacher_layers
from hf_distill.losses.feature import HIDDEN_LOSSES
from hf_distill.modeling import causal_lm, evaluating, head_of, hidden_widths, num_layers, select_positions
from hf_distill.teachers import ModelTeacher
from hf_distill.teachers.local import signal_of
from hf_distill.trainers.checks import one_width_each, saved_mapping
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.terms import Run

PROJECTOR = "hidden_projector"
TITLE = "hidden states"


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
        `ValueError`: layers that do not exist, that do not give one vector per token, or vectors of several widths; a
            projector, and an optimizer of one's own.
    """

    name = "hidden"
    forward: Mapping[str, Any] = {"output_hidden_states": True}

    def __init__(self, run: Run, teacher: ModelTeacher) -> None:
        args: KDConfig = run.args
        self._teacher = teacher
        depths = [num_layers(causal_lm(side).config.get_text_config()) for side in (run.student, teacher.model)]
        self._layers = args.hidden_layers
        mapping = self._measured(run, depths) if self._layers == "cka" else layer_mapping(self._layers, *depths)
        self.use(mapping)
        self.distance = HIDDEN_LOSSES[args.hidden_loss]
        self._settings = f"{args.hidden_loss}, weight {args.hidden_weight:g}"
        widths = self._widths(run, mapping, teacher_layers(mapping))
        self.widths = mine, theirs = one_width_each(widths, "hidden states", "hidden_layers")
        self.projectors: dict[str, nn.Module] = {}
        self.projector = None
        if mine != theirs:
            if run.optimizer is not None:
                raise ValueError(
                    f"student and teacher have hidden sizes {mine} and {theirs}, and the projector between them would "
                    "not be in an optimizer of your own: leave optimizers out"
                )
            self.projector = HiddenProjector(mine, theirs, len(mapping)).to(args.device)
            self.projectors[PROJECTOR] = self.projector

    def _measured(self, run: Run, depths: Sequence[int]) -> LayerMapping:
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

    def use(self, mapping: LayerMapping) -> None:
        """Learns from these layers of the teacher, which then are part of its signal."""
        self.mapping = mapping
        self._teacher.layers = tuple(teacher_layers(mapping))

    def mappings(self) -> dict[str, LayerMapping]:
        return {TITLE: self.mapping}

    def resume(self, mappings: Mapping[str, LayerMapping]) -> None:
        self.use(saved_mapping(mappings, TITLE, self.mapping, self._layers))

    def describe(self) -> dict[str, str]:
        return {TITLE: f"{self._settings}, layers {describe_mapping(self.mapping)}"}

    def loss(
        self, outputs: Any, signal: Any, positions: Tensor, weight: float, divisor: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """As of [`Term`]; the sum is the mean over mapped layers of the distances, summed over N positions."""
        assert signal.layers is not None
        losses = []
        for index, (layer, sources) in enumerate(self.mapping.items()):
            student = select_positions(outputs.hidden_states[layer + 1], positions)  # (N, Ds)
            if self.projector is not None:
                student = self.projector(student, index)  # (N, Dt)
            target: Any = sum(weight * signal.layers[i].to(student.device) for i, weight in sources.items())
            losses.append(self.distance(student, target, num_items=1)[0])
        total = torch.stack(losses).mean()
        return (weight / torch.as_tensor(divisor)).to(total.device) * total, total
