"""KVProjectionTrainer: KDTrainer with a term for the teacher's keys and values."""

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.kv_projector import KVProjector, PCAProjector
from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import cka_mapping, describe_mapping, layer_mapping, linear_cka, teacher_layers
from hf_distill.losses.feature import FEATURE_LOSSES, centered_cosine, effective_rank
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.modeling import KVCapture, causal_lm, evaluating, kv_widths, last_hidden_states, num_layers
from hf_distill.teachers import Signal, require_model
from hf_distill.teachers.columns import PREFIX
from hf_distill.teachers.opening import require_models, teacher_weights
from hf_distill.trainers.checks import refuse_other_layers
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.kv_projection_config import KVProjectionConfig

logger = logging.getLogger(__name__)

DIAGNOSTICS = ("kv/centered_cosine", "kv/cka", "kv/magnitude_ratio", "kv/target_effective_rank")
# A cosine that rose by this much since the first evaluation, while the divergence from the teacher did not fall by a
# hundredth, the CKA lost a tenth or the projected target a third of its directions, is no learning.
RISE, PROGRESS, LOSS_OF_CKA, LOSS_OF_RANK = 0.05, 0.99, 0.9, 2 / 3
# Beside such a weight the other terms say nothing.
ALONE = 100.0


class KVProjectionTrainer(KDTrainer):
    """Distils the keys and values of the teacher, brought to the student's width by a projector, beside its logits.

    `loss = KDTrainer's + kv_weight * the mean over mapped layers, keys and values of the distance of the student's from
    the projected teacher's`, at the positions that predict a label-bearing token. By default the distance is one of
    direction ([`~hf_distill.losses.feature.mercator_loss`]). A high cosine alone is no success: student and projector
    can meet where nothing is said about the teacher. `kv/centered_cosine`, `kv/cka` and the held-out divergence tell.

    Args:
        model, teacher_model, train_dataset and everything else: as in [`KDTrainer`].
        args ([`KVProjectionConfig`], *optional*): settings.

    Raises:
        `ValueError`: at construction, what [`KDTrainer`] refuses; layers that do not exist or have no keys and values;
            an optimizer of one's own, which would not train the projector.
    """

    args: KVProjectionConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    _config = KVProjectionConfig
    _output_dir = "kv_projection_output"
    _evaluated = ("kv",)
    _crosses_tokenizers = False  # keys and values are compared token by token
    _tag_names = [*KDTrainer._tag_names, "kv-cache-distillation"]
    _name = "KV projection"

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: KVProjectionConfig | None = None,
        *positional: Any,
        **kwargs: Any,
    ):
        args = self.settings(args)
        if any(part is not None for part in kwargs.get("optimizers") or ()):
            raise ValueError("optimizers are not taken: the projector has to be in them, with its own learning rate")
        if args.teacher_combination == "route":
            raise ValueError(
                "teacher_combination='route' gives each row one teacher, whose keys and values only that "
                "row has: take 'mixture' or 'sum', or KDTrainer"
            )
        super().__init__(model, teacher_model, args, *positional, **kwargs)
        if args.projector_freeze_after is not None and self.is_deepspeed_enabled:
            raise ValueError(
                "projector_freeze_after cannot take gradients out of DeepSpeed: remove it, or use FSDP2 or DDP"
            )
        self.models = {name: require_model(teacher, "KVProjectionTrainer") for name, teacher in self.teachers.items()}
        weighted = {name: weight for name, weight in teacher_weights(self.teacher, self.teachers).items() if weight}
        self.sources = {name: self._make_source(name, weight) for name, weight in weighted.items()}
        layers = {layer for source in self.sources.values() for layer in source.mapping}
        self._capture = KVCapture(self.student, layers, args.kv_positions)
        self._first: dict[str, dict[str, float]] = {}  # the first evaluation of each set
        # A projector that stays as it is cannot move to meet the student.
        self._has_warned = not any(True for source in self.sources.values() for _ in source.projector.parameters())
        if not self._has_warned and self.eval_dataset is None:
            logger.warning(
                "without an eval_dataset nobody sees whether student and projector meet where nothing is said"
            )
        if not self._has_warned and self.args.kv_weight >= ALONE:
            logger.warning(
                "kv_weight=%g leaves next to nothing of the other terms: the cosine of keys and values rises, and the "
                "student learns nothing. Take a weight around 1, or projector='pca'", self.args.kv_weight,
            )  # fmt: skip
        for name, source in self.sources.items():
            self._tell(f"keys and values of {name}, student's layer <- teacher's: {describe_mapping(source.mapping)}")

    @staticmethod
    def _layer_settings(args: Any, teachers: Mapping[str, Any]) -> list[Any]:
        require_models(teachers, "KVProjectionTrainer")
        return [*KDTrainer._layer_settings(args, teachers), args.kv_layers]

    # ------------------------------------------------------------------------------------------------- the heart

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.projectors.train(self.model.training)
        captures = [self._capture, *(source.capture for source in self.sources.values())]
        try:
            with self._capture():
                return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            for capture in captures:
                capture.heads = {}

    def teacher_signal(self, inputs: dict[str, Any], positions: Tensor) -> Signal | None:
        self._capture.positions = positions
        with ExitStack() as stack:
            for name, source in self.sources.items():
                _, own_positions = self.models[name].view(inputs, positions)
                stack.enter_context(source.capture(own_positions))
            return super().teacher_signal(inputs, positions)

    @staticmethod
    def _has_signal(args: Any) -> bool:
        return True

    def _needs_signal(self) -> bool:
        return True  # what is captured comes out of the teachers' forwards

    def distillation_terms(
        self, hidden: Tensor, head: Head, signal: Signal | None, labels: Tensor, objective: Objective
    ) -> dict[str, Any]:
        terms = super().distillation_terms(hidden, head, signal, labels, objective)
        divisor = objective.divisor(len(hidden))
        kv = self.kv_loss(divisor)
        terms["loss"] = terms["loss"] + self.setting("kv_weight") * kv
        terms["kv"] = kv.detach() * torch.as_tensor(divisor, device=kv.device)  # a sum over tokens, as the others
        return terms

    def kv_loss(self, num_items: Tensor | float) -> Tensor:
        """The mean over mapped layers, keys and values, of a sum over N positions divided by `num_items`; a scalar.

        Of several teachers, the mean of theirs by their weights.
        """
        options: dict[str, Any] = {"num_items": torch.as_tensor(num_items, device=self.args.device)}
        if self.args.kv_loss == "mercator":
            options |= {name: getattr(self.args, name) for name in ("direction_weight", "magnitude_weight")}
        total, seen = torch.zeros((), device=self.args.device), {}
        for name, source in self.sources.items():
            losses = []
            for index, layer in enumerate(source.mapping):
                student = self._capture.features(layer)  # keys and values, (N, Fs) each
                teacher = source.features(layer, self.args.device)  # (N, Ft) each
                projected = source.projector(*teacher, index)  # (N, Fs) each
                mask = torch.ones(len(student[0]), dtype=torch.bool, device=student[0].device)
                found = [
                    FEATURE_LOSSES[self.args.kv_loss](s, t, mask, **options)
                    for s, t in zip(student, projected, strict=True)
                ]
                losses += [loss for loss, _ in found]
                key = f"layer_{layer}" if len(self.sources) == 1 else f"{name}_layer_{layer}"
                seen[key] = student, teacher, projected, torch.stack([cosine for _, cosine in found]).mean()
            total = total + source.weight * torch.stack(losses).mean()
        self._record_kv(seen)
        return total

    # ----------------------------------------------------------------------------------------------- the projector

    def _make_source(self, name: str, weight: float) -> "KVSource":
        """One teacher's part of the term: its layers, its projector, its weight."""
        model = causal_lm(self.models[name].model)
        depths = [num_layers(side.config.get_text_config()) for side in (self.student, model)]
        if self.args.kv_layers == "cka":
            self._widths(model, *map(range, depths))  # layers without keys would shift the others' numbers
            student, teacher = (
                [torch.cat(pair, 1) for pair in side.values()] for side in self._probe(name, *map(range, depths))
            )
            mapping = cka_mapping(student, teacher)
        else:
            mapping = layer_mapping(self.args.kv_layers, *depths)
        layers = teacher_layers(mapping)
        widths = []
        for called, found in zip(("student", "teacher"), self._widths(model, mapping, layers), strict=True):
            if len(found) > 1:
                raise ValueError(
                    f"the {called}'s mapped layers have keys of widths {sorted(found)}: choose with kv_layers"
                )
            widths = [*found, *widths]  # from the teacher's to the student's
        projector = self._make_projector(name, mapping, layers, widths).to(self.args.device)
        # With one teacher the files are projector.safetensors and projector.json.
        key = "projector" if len(self.teachers) == 1 else f"projector_{re.sub(r'[^A-Za-z0-9-]+', '_', name)}"
        key = key if key not in self.projectors else f"{key}_{len(self.projectors)}"
        self.projectors[key] = projector
        return KVSource(mapping, projector, KVCapture(model, layers, self.args.kv_positions), weight)

    def _widths(
        self, teacher: PreTrainedModel, student_layers: Iterable[int], teacher_layers: Iterable[int]
    ) -> list[set[int]]:
        """The widths of the keys of some layers of student and teacher."""
        with self.trying_out():
            mine = kv_widths(self.student, student_layers, "student", self.args.kv_positions)
        theirs = kv_widths(teacher, teacher_layers, "teacher", self.args.kv_positions)
        return [set(mine.values()), set(theirs.values())]

    def layer_mappings(self) -> dict[str, LayerMapping]:
        own = {f"keys and values of {name}": source.mapping for name, source in self.sources.items()}
        return super().layer_mappings() | own

    def use_layer_mappings(self, mappings: dict[str, LayerMapping]) -> None:
        super().use_layer_mappings(mappings)
        for name, source in self.sources.items():
            mapping = mappings.get(f"keys and values of {name}", source.mapping)
            if self.args.kv_layers != "cka":
                refuse_other_layers(mapping, source.mapping)
            model = causal_lm(self.models[name].model)
            capture = KVCapture(model, teacher_layers(mapping), self.args.kv_positions)
            self.sources[name] = source._replace(mapping=mapping, capture=capture)

    def _probe(
        self, name: str, student_layers: Iterable[int], teacher_layers: Iterable[int]
    ) -> list[dict[int, tuple[Tensor, Tensor]]]:
        """Keys and values of some layers of student and teacher on a few training rows."""
        inputs, positions = self.probe_batch()
        own, own_positions = self.models[name].view(inputs, positions)
        student_inputs = {key: value for key, value in inputs.items() if not key.startswith(PREFIX)}
        student = KVCapture(self.student, student_layers, self.args.kv_positions)
        with torch.no_grad(), evaluating(self.student), self.trying_out(), student(positions):
            last_hidden_states(self.student, **student_inputs)
        teacher = KVCapture(causal_lm(self.models[name].model), teacher_layers, self.args.kv_positions)
        with teacher(own_positions):
            self.models[name](own, own_positions)

        def features(side: KVCapture, layer: int) -> tuple[Tensor, Tensor]:
            keys, values = side.features(layer)
            return keys.cpu(), values.cpu()  # Before an engine has prepared the student, the devices may differ.

        return [{layer: features(side, layer) for layer in sorted(side.heads)} for side in (student, teacher)]

    def _make_projector(
        self, name: str, mapping: LayerMapping, layers: list[int], widths: list[int]
    ) -> KVProjector | PCAProjector:
        if self.args.projector == "mlp":
            options = {"mlp_ratio": self.args.projector_mlp_ratio, "dropout": self.args.projector_dropout}
            return KVProjector(widths[0], widths[1], len(mapping), **options)
        projector = PCAProjector(widths[0], widths[1], len(mapping))
        student, teacher = self._probe(name, mapping, layers)
        for index, (layer, teachers) in enumerate(mapping.items()):
            for kind in range(2):
                target: Any = sum(weight * teacher[i][kind] for i, weight in teachers.items())
                projector.fit(kind, index, target, student[layer][kind])
        return projector

    def _clip_grad_norm(self, *args, **kwargs):
        self._drop_frozen_gradients()
        return super()._clip_grad_norm(*args, **kwargs)

    def _get_grad_norm(self, *args, **kwargs):
        self._drop_frozen_gradients()  # without clipping, too
        return super()._get_grad_norm(*args, **kwargs)

    def _drop_frozen_gradients(self) -> None:
        after = self.args.projector_freeze_after
        if after is not None and self.state.global_step >= after:
            for source in self.sources.values():
                for parameter in source.projector.parameters():
                    parameter.grad = None  # the optimizer passes over it

    # --------------------------------------------------------------------------------------------------- metrics

    @torch.no_grad()
    def _record_kv(self, seen: dict[str, tuple[Any, Any, Any, Tensor]]) -> None:
        """Student's, teacher's and projected keys and values and their cosine, by layer: as means over tokens."""
        mode = "train" if self.model.training else "eval"
        count = len(next(iter(seen.values()))[0][0])
        cosines = {f"kv/cosine_{layer}": cosine for layer, (*_, cosine) in seen.items()}
        cosines = {"kv/cosine": torch.stack(list(cosines.values())).mean(), **cosines}
        self.add_means(mode, "keys and values", count, **{name: value * count for name, value in cosines.items()})
        if not self._is_logging(mode):
            return  # what follows looks at all tokens of a batch at once, and costs
        found = {name: [] for name in DIAGNOSTICS}
        for student, teacher, projected, _ in seen.values():
            for triple in zip(student, teacher, projected, strict=True):
                values = _diagnose(*(features.float() for features in triple)) if count > 1 else [0.0] * 4
                for name, value in zip(DIAGNOSTICS, values, strict=True):
                    found[name].append(torch.as_tensor(value, device=self.args.device))
        means = {name: torch.stack(values).mean() * count for name, values in found.items()}
        self.add_means(mode, "diagnostics", count if count > 1 else 0, **means)  # a single token says nothing

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = output.metrics or {}
        found = {name.removeprefix(f"{metric_key_prefix}_"): value for name, value in metrics.items()}
        self._warn_of_collapse(found, metric_key_prefix)
        return output

    def _warn_of_collapse(self, found: dict[str, float], name: str = "eval") -> None:
        """Compares an evaluation with the first one on the same rows: does the cosine rise while nothing is learned?"""
        first = self._first.setdefault(name, found)
        if self._has_warned or "kv/cka" not in found or "kv/cka" not in first:
            return
        rises = found["kv/cosine"] > first["kv/cosine"] + RISE
        rank = "kv/target_effective_rank"
        learns = (
            found["kd"] < PROGRESS * first["kd"]
            and found["kv/cka"] > LOSS_OF_CKA * first["kv/cka"]
            and found[rank] > LOSS_OF_RANK * first[rank]
        )
        if rises and not learns:
            self._has_warned = True
            logger.warning(
                "the cosine of keys and values rose from %.3f to %.3f on held-out rows, but the divergence from the "
                "teacher went from %.4f to %.4f, the CKA with the teacher's own keys and values from %.3f to %.3f and "
                "the effective rank of the projected target from %.1f to %.1f: student and projector meet where "
                "nothing is said about the teacher. Take projector='pca', raise kd_weight, lower kv_weight or freeze "
                "the projector early (projector_freeze_after)",
                *(side[name] for name in ("kv/cosine", "kd", "kv/cka", rank) for side in (first, found)),
            )  # fmt: skip

    def describe(self) -> dict[str, str]:
        term = f"{self.args.kv_loss}, weight {self.args.kv_weight:g}, projector {self.args.projector}"
        found = {**super().describe(), "keys and values": term}
        for name, source in self.sources.items():
            title = "layers (student <- teacher)" if len(self.sources) == 1 else f"layers (student <- {name})"
            found[title] = describe_mapping(source.mapping)
        return found


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
