"""KVProjectionTrainer: KDTrainer with a term for the teacher's keys and values."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.kv_projector import CONFIG, KVProjector, PCAProjector, load_projector, save_projector
from hf_distill.layer_mapping import Mapping, cka_mapping, layer_mapping, linear_cka
from hf_distill.losses.feature import FEATURE_LOSSES, centered_cosine, effective_rank
from hf_distill.losses.fused_linear import Head
from hf_distill.metrics import TokenMeans
from hf_distill.modeling import KVCapture, causal_lm, evaluating, kv_widths, label_positions, last_hidden_states
from hf_distill.report import table
from hf_distill.teachers import TeacherSignal
from hf_distill.teachers.local import LocalTeacher
from hf_distill.trainers.checkpoints import problem_of
from hf_distill.trainers.config import KVProjectionConfig
from hf_distill.trainers.kd import KDTrainer

logger = logging.getLogger(__name__)

PROBE_ROWS = 16
DIAGNOSTICS = ("kv/centered_cosine", "kv/cka", "kv/magnitude_ratio", "kv/target_effective_rank")
# A cosine that rose by this much since the first evaluation, while the divergence from the teacher did not fall by a
# hundredth or the CKA lost a tenth, is no learning.
RISE, PROGRESS, LOSS_OF_CKA = 0.05, 0.99, 0.9


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
    teacher: LocalTeacher  # pyright: ignore[reportIncompatibleVariableOverride]

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
        args = KVProjectionConfig(output_dir="kv_projection_output") if args is None else args
        if not isinstance(args, KVProjectionConfig):
            raise ValueError(f"args has to be a KVProjectionConfig, got {type(args).__name__}")
        if any(part is not None for part in kwargs.get("optimizers") or ()):
            raise ValueError("optimizers are not taken: the projector has to be in them, with its own learning rate")
        self._kv_means: dict[str, TokenMeans] = {}
        self._kv_diagnostics: dict[str, TokenMeans] = {}
        super().__init__(model, teacher_model, args, *positional, **kwargs)
        self.student, teacher = causal_lm(self.model), causal_lm(self.teacher.model)
        depths = [side.config.get_text_config().num_hidden_layers for side in (self.student, teacher)]
        if args.kv_layers == "cka":
            probe = self._probe(*map(range, depths))
            self.mapping: Mapping = cka_mapping(*[[torch.cat(pair, 1) for pair in side.values()] for side in probe])  # pyright: ignore
        else:
            self.mapping = layer_mapping(args.kv_layers, *depths)
        sources = sorted({layer for teachers in self.mapping.values() for layer in teachers})
        widths = []
        for side, layers, name in ((teacher, sources, "teacher"), (self.student, self.mapping, "student")):
            found = set(kv_widths(side, layers, name, args.kv_positions).values())
            if len(found) > 1:
                raise ValueError(
                    f"the {name}'s mapped layers have keys of widths {sorted(found)}: choose with kv_layers"
                )
            widths += found
        self.projector = self._make_projector(widths[0], widths[1], sources).to(self.args.device)
        self._captures = {
            "student": KVCapture(self.student, self.mapping, args.kv_positions),
            "teacher": KVCapture(teacher, sources, args.kv_positions),
        }
        self._first: dict[str, dict[str, float]] = {}  # the first evaluation of each set
        self._has_warned = False
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            Console().print(table(self._mapping_rows(), "which layer learns from which"))

    # ------------------------------------------------------------------------------------------------- the heart

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.projector.train(self.model.training)
        try:
            with self._captures["student"]():
                return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            for capture in self._captures.values():
                capture.heads = {}

    def teacher_signal(self, inputs: dict[str, Any], positions: Tensor) -> TeacherSignal:
        self._captures["student"].positions = positions
        with self._captures["teacher"](positions):
            return super().teacher_signal(inputs, positions)

    def distillation_terms(
        self, hidden: Tensor, head: Head, signal: TeacherSignal, labels: Tensor, num_items: Tensor | int
    ) -> dict[str, Tensor]:
        terms = super().distillation_terms(hidden, head, signal, labels, num_items)
        terms["loss"] = terms["loss"] + self.args.kv_weight * self.kv_loss(num_items)
        return terms

    def kv_loss(self, num_items: Tensor | int) -> Tensor:
        """The mean over mapped layers, keys and values, of a sum over N positions divided by `num_items`; a scalar."""
        options = {"num_items": torch.as_tensor(num_items, device=self.args.device).clamp(min=1)}
        if self.args.kv_loss == "mercator":
            options |= {name: getattr(self.args, name) for name in ("direction_weight", "magnitude_weight")}
        losses, seen = [], {}
        for index, layer in enumerate(self.mapping):
            student = self._captures["student"].features(layer)  # keys and values, (N, Fs) each
            teacher = self._teacher_features(layer)  # (N, Ft) each
            projected = self.projector(*teacher, index)  # (N, Fs) each
            mask = torch.ones(len(student[0]), dtype=torch.bool, device=student[0].device)
            found = [
                FEATURE_LOSSES[self.args.kv_loss](s, t, mask, **options)
                for s, t in zip(student, projected, strict=True)
            ]
            losses += [loss for loss, _ in found]
            seen[layer] = student, teacher, projected, torch.stack([cosine for _, cosine in found]).mean()
        self._record_kv(seen)
        return torch.stack(losses).mean()

    def _teacher_features(self, layer: int) -> list[Tensor]:
        """Keys and values (N, Ft) of the teacher's layers that a student's learns from, by their weights."""
        features = self._captures["teacher"].features
        parts = [(weight, features(i)) for i, weight in self.mapping[layer].items()]
        dtype = next(self.projector.parameters(), torch.empty(0)).dtype
        return [
            sum(weight * pair[kind].to(self.args.device, dtype) for weight, pair in parts)  # pyright: ignore
            for kind in range(2)
        ]

    # ----------------------------------------------------------------------------------------------- the projector

    def _probe(
        self, student_layers: Iterable[int], teacher_layers: Iterable[int]
    ) -> list[dict[int, tuple[Tensor, Tensor]]]:
        """Keys and values of some layers of student and teacher on a few training rows."""
        rows = list(islice(iter(self.train_dataset), PROBE_ROWS))  # pyright: ignore
        names = ("input_ids", "labels", "seq_lengths")
        batch = self.data_collator([{k: v for k, v in row.items() if k in names} for row in rows])
        positions, _ = label_positions(batch.pop("labels"))
        inputs = {name: tensor.to(self.student.device) for name, tensor in batch.items() if isinstance(tensor, Tensor)}
        student = KVCapture(self.student, student_layers, self.args.kv_positions)
        with torch.no_grad(), evaluating(self.student), student(positions):
            last_hidden_states(self.student, **inputs)
        teacher = KVCapture(causal_lm(self.teacher.model), teacher_layers, self.args.kv_positions)
        with teacher(positions):
            self.teacher(inputs, positions)
        return [{layer: side.features(layer) for layer in sorted(side.heads)} for side in (student, teacher)]

    def _make_projector(self, teacher_width: int, student_width: int, sources: list[int]) -> KVProjector | PCAProjector:
        if self.args.projector == "mlp":
            sizes = teacher_width, student_width, len(self.mapping)
            return KVProjector(*sizes, self.args.projector_mlp_ratio, self.args.projector_dropout)
        projector = PCAProjector(teacher_width, student_width, len(self.mapping))
        student, teacher = self._probe(self.mapping, sources)
        for index, (layer, teachers) in enumerate(self.mapping.items()):
            for kind in range(2):
                target = sum(weight * teacher[i][kind] for i, weight in teachers.items())
                projector.fit(kind, index, target.cpu(), student[layer][kind].cpu())  # pyright: ignore
        return projector

    def train(self, *args, **kwargs):
        with self._attached():
            return super().train(*args, **kwargs)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The projector as a part of the student: zeroed, clipped, reduced, sharded and moved with it."""
        self.student.kv_projector = self.projector
        try:
            yield
        finally:
            del self.student.kv_projector

    @contextmanager
    def _detached(self) -> Iterator[None]:
        attached = hasattr(self.student, "kv_projector")
        if attached:
            del self.student.kv_projector
        try:
            yield
        finally:
            if attached:
                self.student.kv_projector = self.projector

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        own = {id(parameter) for parameter in self.projector.parameters()}
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in own]
            if mine:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": mine, "lr": self.args.projector_learning_rate})
        return optimizer

    def _clip_grad_norm(self, *args, **kwargs):
        self._drop_frozen_gradients()
        return super()._clip_grad_norm(*args, **kwargs)

    def _get_grad_norm(self, *args, **kwargs):
        self._drop_frozen_gradients()  # without clipping, too
        return super()._get_grad_norm(*args, **kwargs)

    def _drop_frozen_gradients(self) -> None:
        after = self.args.projector_freeze_after
        if after is not None and self.state.global_step >= after:
            for parameter in self.projector.parameters():
                parameter.grad = None  # the optimizer passes over it

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        state_dict = state_dict and {k: v for k, v in state_dict.items() if "kv_projector." not in k}
        with self._detached():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_projector(self.projector, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with self._detached():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_projector(resume_from_checkpoint)

    @staticmethod
    def _checkpoint_problem(checkpoint: Path) -> str | None:
        if not (checkpoint / CONFIG).exists():
            return "has no projector: it is no checkpoint of KVProjectionTrainer"
        return problem_of(checkpoint)

    def _load_best_model(self) -> None:
        with self._detached():
            super()._load_best_model()
        self._load_projector(str(self.state.best_model_checkpoint))

    def _load_projector(self, folder: str) -> None:
        self.projector.load_state_dict(load_projector(folder).state_dict())

    # --------------------------------------------------------------------------------------------------- metrics

    @torch.no_grad()
    def _record_kv(self, seen: dict[int, tuple[Any, Any, Any, Tensor]]) -> None:
        """Student's, teacher's and projected keys and values and their cosine, by layer: as means over tokens."""
        mode = "train" if self.model.training else "eval"
        count = len(next(iter(seen.values()))[0][0])
        cosines = {f"kv/cosine_layer_{layer}": cosine for layer, (*_, cosine) in seen.items()}
        cosines = {"kv/cosine": torch.stack(list(cosines.values())).mean(), **cosines}
        self._kv_means[mode].add(count, **{name: value * count for name, value in cosines.items()})
        if not self._is_logging(mode):
            return  # what follows looks at all tokens of a batch at once, and costs
        found = {name: [] for name in DIAGNOSTICS}
        for student, teacher, projected, _ in seen.values():
            for triple in zip(student, teacher, projected, strict=True):
                values = _diagnose(*(features.float() for features in triple)) if count > 1 else [0.0] * 4
                for name, value in zip(DIAGNOSTICS, values, strict=True):
                    found[name].append(torch.as_tensor(value, device=self.args.device))
        means = {name: torch.stack(values).mean() * count for name, values in found.items()}
        self._kv_diagnostics[mode].add(count if count > 1 else 0, **means)  # a single token says nothing

    def _reset_means(self, mode: str) -> None:
        super()._reset_means(mode)
        self._kv_means[mode], self._kv_diagnostics[mode] = TokenMeans(), TokenMeans()

    def _pop_means(self, mode: str) -> dict[str, float]:
        parts = (self._kv_means[mode], self._kv_diagnostics[mode])
        found = {name: value for part in parts for name, value in part.pop(self._sum_over_processes).items()}
        return super()._pop_means(mode) | found

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = {name.removeprefix(f"{metric_key_prefix}_"): value for name, value in output.metrics.items()}  # pyright: ignore
        self._warn_of_collapse(found, metric_key_prefix)
        return output

    def _warn_of_collapse(self, found: dict[str, float], name: str = "eval") -> None:
        """Compares an evaluation with the first one on the same rows: does the cosine rise while nothing is learned?"""
        first = self._first.setdefault(name, found)
        if self._has_warned or "kv/cka" not in found or "kv/cka" not in first:
            return
        rises = found["kv/cosine"] > first["kv/cosine"] + RISE
        learns = found["kd"] < PROGRESS * first["kd"] and found["kv/cka"] > LOSS_OF_CKA * first["kv/cka"]
        if rises and not learns:
            self._has_warned = True
            logger.warning(
                "the cosine of keys and values rose from %.3f to %.3f on held-out rows, but the divergence from the "
                "teacher went from %.4f to %.4f and the CKA with the teacher's own keys and values from %.3f to %.3f: "
                "student and projector meet where nothing is said about the teacher. Take projector='pca', raise "
                "kd_weight, lower kv_weight or freeze the projector early (projector_freeze_after)",
                first["kv/cosine"], found["kv/cosine"], first["kd"], found["kd"], first["kv/cka"], found["kv/cka"],
            )  # fmt: skip

    def describe(self) -> dict[str, str]:
        layers = "; ".join(f"{row['student layer']} <- {row['teacher layers']}" for row in self._mapping_rows())
        term = f"{self.args.kv_loss}, weight {self.args.kv_weight:g}, projector {self.args.projector}"
        return {**super().describe(), "keys and values": term, "layers (student <- teacher)": layers}

    def _mapping_rows(self) -> list[dict[str, str]]:
        return [
            {
                "student layer": str(layer),
                "teacher layers": ", ".join(f"{i} ({weight:.0%})" for i, weight in ts.items()),
            }
            for layer, ts in self.mapping.items()
        ]


def _diagnose(student: Tensor, teacher: Tensor, projected: Tensor) -> tuple[Tensor, ...]:
    """The `DIAGNOSTICS` of one layer's keys or values (N, F), (N, Ft) and (N, F)."""
    ratio = student.norm(dim=-1).mean() / projected.norm(dim=-1).mean().clamp(min=1e-12)
    return centered_cosine(student, projected), linear_cka(student, teacher), ratio, effective_rank(projected)
