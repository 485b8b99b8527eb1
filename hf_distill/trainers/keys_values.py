"""The term of keys and values: which layers, through which projector, how far apart.

Shapes: B batch, T tokens, N label-bearing positions, Fs and Ft widths of the keys of student and teacher.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.kv_projector import KVProjector, PCAProjector
from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import cka_mapping, describe_mapping, layer_mapping, linear_cka, teacher_layers
from hf_distill.losses.feature import FEATURE_LOSSES, centered_cosine, effective_rank
from hf_distill.modeling import KVCapture, causal_lm, evaluating, kv_widths, last_hidden_states, num_layers
from hf_distill.teachers import ModelTeacher
from hf_distill.teachers.columns import PREFIX
from hf_distill.trainers.checks import one_width_each, saved_mapping
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.terms import Run

DIAGNOSTICS = ("kv/centered_cosine", "kv/cka", "kv/magnitude_ratio", "kv/target_effective_rank")
TITLE = "keys and values"


class KeysValues:
    """The term that compares a student's keys and values with those of its teachers (`kv_layers`, `kv_loss`).

    They are captured in the forwards of student and teachers: the trainer makes the teachers' forwards within
    `capturing_teachers`, and all of its micro-batch within `capturing`.

    Attributes:
        sources (`dict` of `str` to [`KVSource`]): each teacher's part, by its name.

    Args:
        run ([`Run`]): the trainer.
        teachers (`dict` of `str` to [`ModelTeacher`]): by name.
        weights (`dict` of `str` to `float`): of the teachers. Those without weight have no part.

    Raises:
        `ValueError`: layers that do not exist or have no keys and values, or keys of several widths.
    """

    name = "kv"
    forward: Mapping[str, Any] = {}

    def __init__(self, run: Run, teachers: Mapping[str, ModelTeacher], weights: Mapping[str, float]) -> None:
        self._run, self._teachers = run, teachers
        self.args: KVProjectionConfig = run.args
        self.projectors: dict[str, nn.Module] = {}
        self.sources = {name: self._make_source(name, weight) for name, weight in weights.items() if weight}
        layers = {layer for source in self.sources.values() for layer in source.mapping}
        self._capture = KVCapture(run.student, layers, self.args.kv_positions)

    # --------------------------------------------------------------------------------------------------- the forwards

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Captures the student's forward inside the context. After it, all that was captured is forgotten."""
        try:
            with self._capture():
                yield
        finally:
            for capture in (self._capture, *(source.capture for source in self.sources.values())):
                capture.heads = {}

    @contextmanager
    def capturing_teachers(self, inputs: dict[str, Any], positions: Tensor) -> Iterator[None]:
        """Captures the teachers' forwards inside the context: keys and values at flat `positions` (N,) of a batch."""
        self._capture.positions = positions
        with ExitStack() as stack:
            for name, source in self.sources.items():
                _, own_positions = self._teachers[name].view(inputs, positions)
                stack.enter_context(source.capture(own_positions))
            yield

    # ------------------------------------------------------------------------------------------------------ the term

    def loss(
        self, outputs: Any, signal: Any, positions: Tensor, weight: float, divisor: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """As of [`Term`]; the sum is the mean over mapped layers, keys and values, of a sum over N positions.

        Of several teachers, the mean of theirs by their weights.
        """
        options: dict[str, Any] = {"num_items": torch.as_tensor(divisor, device=self.args.device)}
        if self.args.kv_loss == "mercator":
            options |= {name: getattr(self.args, name) for name in ("direction_weight", "magnitude_weight")}
        total, seen = torch.zeros((), device=self.args.device), {}
        for name, source in self.sources.items():
            losses = []
            for index, layer in enumerate(source.mapping):
                student = self._capture.features(layer)  # keys and values, (N, Fs) each
                teacher = source.features(layer, self.args.device)  # (N, Ft) each
                projected = source.projector(*teacher, index)  # (N, Fs) each
                found = [
                    FEATURE_LOSSES[self.args.kv_loss](s, t, **options) for s, t in zip(student, projected, strict=True)
                ]
                losses += [loss for loss, _ in found]
                key = f"layer_{layer}" if len(self.sources) == 1 else f"{name}_layer_{layer}"
                seen[key] = student, teacher, projected, torch.stack([cosine for _, cosine in found]).mean()
            total = total + source.weight * torch.stack(losses).mean()
        self._record(seen)
        return weight * total, total.detach() * torch.as_tensor(divisor, device=total.device)

    @torch.no_grad()
    def _record(self, seen: dict[str, tuple[Any, Any, Any, Tensor]]) -> None:
        """Student's, teacher's and projected keys and values and their cosine, by layer: as means over tokens."""
        mode = "train" if self._run.model.training else "eval"
        count = len(next(iter(seen.values()))[0][0])
        cosines = {f"kv/cosine_{layer}": cosine for layer, (*_, cosine) in seen.items()}
        cosines = {"kv/cosine": torch.stack(list(cosines.values())).mean(), **cosines}
        self._run.add_means(mode, TITLE, count, **{name: value * count for name, value in cosines.items()})
        if not self._run.is_logging(mode):
            return  # what follows looks at all tokens of a batch at once, and costs
        found = {name: [] for name in DIAGNOSTICS}
        for student, teacher, projected, _ in seen.values():
            for triple in zip(student, teacher, projected, strict=True):
                values = _diagnose(*(features.float() for features in triple)) if count > 1 else [0.0] * 4
                for name, value in zip(DIAGNOSTICS, values, strict=True):
                    found[name].append(torch.as_tensor(value, device=self.args.device))
        means = {name: torch.stack(values).mean() * count for name, values in found.items()}
        self._run.add_means(mode, "diagnostics", count if count > 1 else 0, **means)  # a single token says nothing

    def describe(self) -> dict[str, str]:
        found = {TITLE: f"{self.args.kv_loss}, weight {self.args.kv_weight:g}, projector {self.args.projector}"}
        for name, source in self.sources.items():
            title = "layers (student <- teacher)" if len(self.sources) == 1 else f"layers (student <- {name})"
            found[title] = describe_mapping(source.mapping)
        return found

    def mappings(self) -> dict[str, LayerMapping]:
        return {f"{TITLE} of {name}": source.mapping for name, source in self.sources.items()}

    def resume(self, mappings: Mapping[str, LayerMapping]) -> None:
        for name, source in self.sources.items():
            mapping = saved_mapping(mappings, f"{TITLE} of {name}", source.mapping, self.args.kv_layers)
            model = causal_lm(self._teachers[name].model)
            capture = KVCapture(model, teacher_layers(mapping), self.args.kv_positions)
            self.sources[name] = source._replace(mapping=mapping, capture=capture)

    # -------------------------------------------------------------------------------------------------------- set up

    def _make_source(self, name: str, weight: float) -> "KVSource":
        """One teacher's part of the term: its layers, its projector, its weight."""
        model = causal_lm(self._teachers[name].model)
        depths = [num_layers(side.config.get_text_config()) for side in (self._run.student, model)]
        if self.args.kv_layers == "cka":
            self._widths(model, *map(range, depths))  # layers without keys would shift the others' numbers
            student, teacher = (
                [torch.cat(pair, 1) for pair in side.values()] for side in self._probe(name, *map(range, depths))
            )
            mapping = cka_mapping(student, teacher)
        else:
            mapping = layer_mapping(self.args.kv_layers, *depths)
        layers = teacher_layers(mapping)
        widths = one_width_each(self._widths(model, mapping, layers), "keys", "kv_layers")
        projector = self._make_projector(name, mapping, layers, widths).to(self.args.device)
        # With one teacher the files are projector.safetensors and projector.json.
        key = "projector" if len(self._teachers) == 1 else f"projector_{re.sub(r'[^A-Za-z0-9-]+', '_', name)}"
        key = key if key not in self.projectors else f"{key}_{len(self.projectors)}"
        self.projectors[key] = projector
        return KVSource(mapping, projector, KVCapture(model, layers, self.args.kv_positions), weight)

    def _widths(
        self, teacher: PreTrainedModel, student_layers: Iterable[int], teacher_layers: Iterable[int]
    ) -> list[set[int]]:
        """The widths of the keys of some layers of student and teacher."""
        with self._run.trying_out():
            mine = kv_widths(self._run.student, student_layers, "student", self.args.kv_positions)
        theirs = kv_widths(teacher, teacher_layers, "teacher", self.args.kv_positions)
        return [set(mine.values()), set(theirs.values())]

    def _probe(
        self, name: str, student_layers: Iterable[int], teacher_layers: Iterable[int]
    ) -> list[dict[int, tuple[Tensor, Tensor]]]:
        """Keys and values of some layers of student and teacher on a few training rows."""
        inputs, positions = self._run.probe_batch()
        own, own_positions = self._teachers[name].view(inputs, positions)
        student_inputs = {key: value for key, value in inputs.items() if not key.startswith(PREFIX)}
        student = KVCapture(self._run.student, student_layers, self.args.kv_positions)
        with torch.no_grad(), evaluating(self._run.student), self._run.trying_out(), student(positions):
            last_hidden_states(self._run.student, **student_inputs)
        teacher = KVCapture(causal_lm(self._teachers[name].model), teacher_layers, self.args.kv_positions)
        with teacher(own_positions):
            self._teachers[name](own, own_positions)

        def features(side: KVCapture, layer: int) -> tuple[Tensor, Tensor]:
            keys, values = side.features(layer)
            return keys.cpu(), values.cpu()  # Before an engine has prepared the student, the devices may differ.

        return [{layer: features(side, layer) for layer in sorted(side.heads)} for side in (student, teacher)]

    def _make_projector(
        self, name: str, mapping: LayerMapping, layers: list[int], widths: list[int]
    ) -> KVProjector | PCAProjector:
        mine, theirs = widths
        if self.args.projector == "mlp":
            options = {"mlp_ratio": self.args.projector_mlp_ratio, "dropout": self.args.projector_dropout}
            return KVProjector(theirs, mine, len(mapping), **options)
        projector = PCAProjector(theirs, mine, len(mapping))
        student, teacher = self._probe(name, mapping, layers)
        for index, (layer, teachers) in enumerate(mapping.items()):
            for kind in range(2):
                target: Any = sum(weight * teacher[i][kind] for i, weight in teachers.items())
                projector.fit(kind, index, target, student[layer][kind])
        return projector


class KVSource(NamedTuple):
    """A teacher's keys and values, as a student learns from them."""

    mapping: LayerMapping
    projector: nn.Module
    capture: KVCapture
    weight: float

    def features(self, layer: int, device: torch.device) -> list[Tensor]:
        """Keys and values (N, Ft) of the teacher's layers that a student's layer learns from, by their weights."""
        parts = [(weight, self.capture.features(i)) for i, weight in self.mapping[layer].items()]
        dtype = next(self.projector.parameters(), torch.empty(0)).dtype
        sides: Any = [sum(weight * pair[kind].to(device, dtype) for weight, pair in parts) for kind in range(2)]
        return sides


def _diagnose(student: Tensor, teacher: Tensor, projected: Tensor) -> tuple[Tensor, ...]:
    """The `DIAGNOSTICS` of one layer's keys or values (N, F), (N, Ft) and (N, F)."""
    ratio = student.norm(dim=-1).mean() / projected.norm(dim=-1).mean().clamp(min=1e-12)
    return centered_cosine(student, projected), linear_cka(student, teacher), ratio, effective_rank(projected)
