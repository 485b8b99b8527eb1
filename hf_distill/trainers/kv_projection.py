"""KVProjectionTrainer: KDTrainer with a term for the teacher's keys and values."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_distill.teachers import Signal, require_model
from hf_distill.teachers.kinds import teacher_weights
from hf_distill.teachers.opening import require_models
from hf_distill.trainers.given import Given
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.keys_values import KeysValues
from hf_distill.trainers.kv_projection_config import KVProjectionConfig

logger = logging.getLogger(__name__)

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
    Arguments that are not listed here are those of [`KDTrainer`].

    Attributes:
        keys_values ([`KeysValues`]): the term.
        sources (`dict` of `str` to [`~hf_distill.trainers.keys_values.KVSource`]): each teacher's part of it, by name.

    Args:
        args ([`KVProjectionConfig`], *optional*): settings.

    Raises:
        `ValueError`: at construction, what [`KDTrainer`] refuses; layers that do not exist or have no keys and values;
            an optimizer of one's own, which would not train the projector.
    """

    args: KVProjectionConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    _config = KVProjectionConfig
    _output_dir = "kv_projection_output"
    _sees = False
    _crosses_tokenizers = False  # keys and values are compared token by token
    _tag_names = [*KDTrainer._tag_names, "kv-cache-distillation"]
    _name = "KV projection"

    def check(self, given: Given, teachers: Mapping[str, Any] | None = None) -> Given:
        if any(part is not None for part in given.optimizers or ()):
            raise ValueError("optimizers are not taken: the projector has to be in them, with its own learning rate")
        if given.args.teacher_combination == "route":
            raise ValueError(
                "teacher_combination='route' gives each row one teacher, whose keys and values only that "
                "row has: take 'mixture' or 'sum', or KDTrainer"
            )
        require_models(teachers or {}, "KVProjectionTrainer")
        return super().check(given, teachers)

    def add_terms(self) -> None:
        if self.args.projector_freeze_after is not None and self.is_deepspeed_enabled:
            raise ValueError(
                "projector_freeze_after cannot take gradients out of DeepSpeed: remove it, or use FSDP2 or DDP"
            )
        super().add_terms()
        models = {name: require_model(teacher, "KVProjectionTrainer") for name, teacher in self.teachers.items()}
        self.keys_values = KeysValues(self, models, teacher_weights(self.teacher, self.teachers))
        self.sources = self.keys_values.sources
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
        self.add_term(self.keys_values)

    # ------------------------------------------------------------------------------------------------- the heart

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.projectors.train(self.model.training)
        with self.keys_values.capturing():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def teacher_signal(self, inputs: dict[str, Any], positions: Tensor) -> Signal | None:
        with self.keys_values.capturing_teachers(inputs, positions):
            return super().teacher_signal(inputs, positions)

    # --------------------------------------------------------------------------------------------- the projector

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

    # ---------------------------------------------------------------------------------------------- collapse

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
