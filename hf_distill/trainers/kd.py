"""KDTrainer: training on a teacher's signal and on hard labels. The heart is `compute_loss`.

What makes rows, hard labels and means exact is in `hard_label.py`, what makes runs survive in `surviving.py`.
Shapes: B batch, T tokens, N label-bearing positions, Ds and Dt hidden widths of student and teacher.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import DataCollator, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_distill.layer_mapping import describe_mapping, load_mappings, save_mappings
from hf_distill.losses.divergence import check_divergence
from hf_distill.losses.hard import hard_label_loss
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.metrics import sum_dtype
from hf_distill.modeling import select_positions, tokenizer_of
from hf_distill.picture_rows import has_pictures
from hf_distill.store.manifest import Manifest
from hf_distill.teachers import Signal, Teacher, TeacherAway, require_model
from hf_distill.teachers.columns import AnyDataset, reason_away, take_columns
from hf_distill.teachers.kinds import describe_sources, describe_teachers, own_views, take_counts
from hf_distill.teachers.local import refuse_student_as_teacher
from hf_distill.teachers.opening import (
    NamedTeachers,
    bind_teachers,
    find_tokenizers,
    is_base,
    name_teachers,
    open_teachers,
    refuse_tokens_alone,
    refuse_without_sight,
    require_models,
)
from hf_distill.teachers.rows import TeacherRows
from hf_distill.teachers.writing import Method
from hf_distill.trainers.caching import store_writer
from hf_distill.trainers.checks import refuse_layers, refuse_teacher_layouts
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.given import Given
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import keywords
from hf_distill.trainers.hidden_layers import HiddenLayers
from hf_distill.trainers.input_checks import check_teachers
from hf_distill.trainers.papers import KNOWLEDGE_DISTILLATION
from hf_distill.trainers.pictures import own_collator
from hf_distill.trainers.terms import Term


class KDTrainer(HardLabelTrainer):
    """Trains a student on the teacher's next-token distributions and on hard labels.

    `loss = kd_weight * T^2 * D_T(teacher, student) + (1 - kd_weight) * CE`, averaged over the label-bearing tokens of
    the whole accumulated batch of all processes (Hinton et al., 1503.02531; other divergences: `docs/losses.md`).
    Everything else is `trl.SFTTrainer`: dataset formats, chat templates, packing, PEFT, evaluation, hub, and the
    arguments that are not listed here.

    Attributes:
        teachers (`dict` of `str` to [`~hf_distill.teachers.Teacher`]): by name.
        teacher ([`~hf_distill.teachers.Teacher`]): all of them as one.
        vocab_size (`int`): token ids below this mean the same to student and teachers; others get no probability.
        terms (`list` of [`~hf_distill.trainers.terms.Term`]): the parts of the loss beside divergence and hard labels.
        hidden_layers ([`HiddenLayers`], *optional*): the term for inner hidden states.
        student, projectors, means and all else: [`HardLabelTrainer`].

    Args:
        model (`str` or `PreTrainedModel`):
            The student, as hub id, local path or model. A folder of adapters is trained on in these adapters.
        teacher_model (`str`, `PreTrainedModel` or [`~hf_distill.teachers.Teacher`], or a list or dict of them):
            The teacher. By name it is loaded in the dtype it was saved in. It is frozen, in eval mode, never saved. A
            store is `cache:folder`, a server `http://host:8000/v1`.
            Several are combined as `args.teacher_combination` says; a dict names them. "base" is the student's own base
            model, with its adapters switched off.
        args ([`KDConfig`], *optional*): settings; by default those of `KDConfig` with an output directory.
        train_dataset (`Dataset` or `IterableDataset`): any TRL format: text, prompt/completion, messages, input_ids.
        eval_dataset (`Dataset`, `IterableDataset` or a dict of them, *optional*): measured with the same loss.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer, by default loaded with it.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The teacher's tokenizer, by default loaded with it. For several teachers a list or dict, or one for all that
            bring none.

    Raises:
        `ValueError`: at construction, for anything that could not be trained on: no teacher, the student as its own
            teacher, another vocabulary, missing columns, no row with a label, a teacher without weights, pictures
            that a model does not see, and what [`KDConfig`] refuses.
    """

    args: KDConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    _config = KDConfig
    _output_dir = "kd_output"
    _signal_metrics = ("kd", "agreement", "alignment/")
    _has_teachers = _crosses_tokenizers = True
    _tag_names = ["hf_distill", "knowledge-distillation"]
    _name = "KD"
    _card_title = "Distillation"
    _paper = KNOWLEDGE_DISTILLATION

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | Teacher | Sequence[Any] | Mapping[str, Any] | None = None,
        args: KDConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | Sequence[Any] | Mapping[str, Any] | None = None,
        data_collator: DataCollator | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        formatting_func: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        given = Given(
            model, self.settings(args), train_dataset, eval_dataset, processing_class, data_collator, peft_config,
            quantization_config, callbacks, optimizers, formatting_func, compute_metrics, optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
        )  # fmt: skip
        if has_pictures(train_dataset):
            refuse_tokens_alone(teacher_model)
        # The teacher comes first: its errors are raised before the student is loaded and the data tokenised.
        named = name_teachers(teacher_model, teacher_processing_class, given.args)
        given = self.check(given, named.models)
        self.open(given, named)
        teacher_rows = TeacherRows(self.teachers, self.teacher, are_asked=self._has_signal(given.args))
        self.start(given, vocab_size=self._opened.vocab_size, teacher_rows=teacher_rows)
        self.attach()
        self.try_run()
        self.terms: list[Term] = []
        self.add_terms()

    # ------------------------------------------------------------------------------------------- steps of construction

    def check(self, given: Given, teachers: Mapping[str, Any] | None = None) -> Given:
        teachers = teachers or {}
        has_base = any(map(is_base, teachers.values()))
        refuse_teacher_layouts(given.args, has_base=has_base)
        refuse_student_as_teacher(given.model, teachers.values())
        given = super().check(given, teachers)
        if given.args.has_hidden and len(teachers) > 1:
            raise ValueError("hidden_weight needs one teacher, whose layers the student's learn from; set it to 0")
        for term in given.args.terms:
            require_models(teachers, f"{term}_weight")
            if hasattr(given.args, f"{term}_layers"):
                refuse_layers(getattr(given.args, f"{term}_layers"), given.model, teachers, given.args)
        if has_base and not given.has_adapters:
            raise ValueError("teacher_model='base' needs a student with adapters: pass a peft_config (--use_peft)")
        return given

    @classmethod
    def evaluated(cls, args: KDConfig) -> tuple[str, ...]:
        own = cls._signal_metrics if cls._has_signal(args) else ()
        return (*super().evaluated(args), *own, *args.terms)

    @staticmethod
    def _has_signal(args: KDConfig) -> bool:
        """True if the teachers are asked at some time of the training, and so in its evaluations."""
        return max(keywords(args.schedule).get("kd_weight", [args.kd_weight])) > 0 or bool(args.terms)

    def open(self, given: Given, named: NamedTeachers) -> None:
        """The second step: the teachers, which are loaded before the student."""
        args = given.args
        if given.has_pictures:
            refuse_without_sight(named, args)
        check_teachers(named.models, args)
        processor = given.processing_class if given.has_pictures else None
        tokenizer, crosses = tokenizer_of(given.processing_class), self._crosses_tokenizers and processor is None
        shared, tokenizers = find_tokenizers(named, tokenizer, args, crosses=crosses)
        for name in [name for name in shared if shared[name] is None]:
            given.check_chat_template(tokenizers[name], f"{name}'s", "teacher_processing_class")
        self._opened = open_teachers(
            named, shared, tokenizers, given.model, tokenizer, args,
            has_adapters=given.peft_config is not None, processor=processor,
        )  # fmt: skip
        self.teachers, self.teacher = self._opened.by_name, self._opened.teacher

    def attach(self) -> None:
        bind_teachers(self._opened, self.model, self.accelerator)
        for own in own_views(self.teachers):
            collator = own_collator(self.data_collator, own.processor, own.spans)
            own.read_with(collator, self.picture_spans, self.args.max_length)
        self.divergence_params = check_divergence(self.args.divergence, keywords(self.args.divergence_params))

    def add_terms(self) -> None:
        """The last step: the terms beside divergence and hard labels. Rows have been tried out, and may be measured."""
        self.hidden_layers = None
        if self.args.has_hidden:
            self.hidden_layers = HiddenLayers(self, require_model(self.teacher, "hidden_weight"))
            self.add_term(self.hidden_layers)

    def add_term(self, term: Term) -> None:
        """Makes a term a part of the loss, checkpoints and model card; its projectors are trained with the student."""
        self.terms.append(term)
        self.projectors.update(term.projectors)
        for name, mapping in term.mappings().items():
            self._tell(f"{name}, student's layer <- teacher's: {describe_mapping(mapping)}")

    # ------------------------------------------------------------------------------------------------- the heart

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The loss of a micro-batch, a scalar: its sum divided by the label-bearing tokens of the whole update."""
        inputs, positions, labels = self.take_labels(inputs)  # (N,) each
        hard_labels = inputs.pop("hard_labels", labels)  # (N,): a student's own samples are no hard labels
        signal = self.teacher_signal(inputs, positions)
        objective = self.objective(labels.numel() if num_items_in_batch is None else num_items_in_batch)

        def with_hidden(outputs: Any, head: Head) -> dict[str, Any]:
            hidden = select_positions(outputs.last_hidden_state, positions)  # (N, Ds)
            terms = self.distillation_terms(hidden, head, signal, hard_labels, objective)
            for term in reversed(self.terms):  # the order decides the last bit of the sum
                weight, divisor = self.setting(f"{term.name}_weight"), objective.divisor(len(hidden))
                share, terms[term.name] = term.loss(outputs, signal, positions, weight, divisor)
                terms["loss"] = terms["loss"] + share
            return self.with_aux_loss(terms, outputs, inputs)

        forward = {name: value for term in self.terms for name, value in term.forward.items()}
        return self.finish(model, inputs, with_hidden, hard_labels, num_items_in_batch, return_outputs, **forward)

    def teacher_signal(self, inputs: dict[str, Any], positions: Tensor) -> Signal | None:
        """The teachers' signal at flat `positions` (N,) of a batch. Removes the teachers' columns from `inputs`.

        None where no term of the loss needs it: the teachers are not asked.
        """
        whole = take_columns(inputs)
        if not self._needs_signal():
            return None
        if (reason := reason_away(whole)) is not None:
            raise TeacherAway(reason)
        return self.teacher(whole, positions)

    def _needs_signal(self) -> bool:
        if self.model.training and not self.terms:
            return self.setting("kd_weight") > 0
        return self._has_signal(self.args)

    def distillation_terms(
        self, hidden: Tensor, head: Head, signal: Signal | None, labels: Tensor, objective: Objective
    ) -> dict[str, Any]:
        """Loss and sums over N label-bearing positions, inside the student's forward.

        Args:
            hidden (`torch.Tensor` of shape `(N, Ds)`), head (`Head`): the student's.
            signal (`Signal`, *optional*): the teachers'; none for hard labels alone.
            labels (`torch.Tensor` of shape `(N,)`): the tokens that follow, -100 for no hard label.
            objective (`Objective`): weights, divergence and divisor.
        """
        if signal is None:
            found = hard_label_loss(hidden, head, labels, objective)
            return {"loss": found.loss, "ce": found.ce, "student_entropy": found.student_entropy}
        terms = signal.loss(hidden, head, labels, objective)._asdict()
        more = terms.pop("more")
        return {**terms, **more}

    def objective(self, num_items: Tensor | int) -> Objective:
        changing = {name: self.setting(name) for name in keywords(self.args.schedule)}
        params = self.divergence_params | {name: changing[name] for name in changing if not hasattr(self.args, name)}
        return replace(
            super().objective(num_items),
            kd_weight=self.setting("kd_weight"),
            temperature=self.setting("temperature"),
            divergence=self.args.divergence,
            divergence_params=params,
            compiled=not changing.keys() & {"kd_weight", "temperature", *params},
        )

    def setting(self, name: str) -> float:
        """The value of a setting at this step; in evaluations its last value, so that their numbers can be compared."""
        if name not in keywords(self.args.schedule):
            return getattr(self.args, name)
        is_training = self.model.training and self.state.max_steps > 0
        return self._setting_of(name, self.state.global_step) if is_training else self.args.scheduled(name, 1.0)

    def _setting_of(self, name: str, step: int) -> float:
        return self.args.scheduled(name, step / max(self.state.max_steps - 1, 1))

    # --------------------------------------------------------------------------------------------- logs, checkpoints

    def create_optimizer(self, *args, **kwargs):
        is_own = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_own:
            self.projectors.give_own_group(optimizer, self.args.projector_learning_rate)
        return optimizer

    def pop_means(self, mode: str) -> dict[str, float]:
        last = max(self.state.global_step - 1, 0)  # the update that has just been made
        scheduled = keywords(self.args.schedule) if mode == "train" else {}
        settings = {f"schedule/{name}": self._setting_of(name, last) for name in scheduled}
        return super().pop_means(mode) | settings | self._pop_counts()

    def _pop_counts(self) -> dict[str, float]:
        """The teachers' counts since the last call, summed over teachers and processes."""
        if not (counts := take_counts(self.teachers)):
            return {}
        total = torch.tensor([*counts.values()], dtype=sum_dtype(self.args.device), device=self.args.device)
        sums = self._sum_over_processes(total).tolist()
        return {f"teacher/{name}": value for name, value in zip(counts, sums, strict=True)}

    def save_extra_state(self, checkpoint: Path) -> None:
        if mappings := {name: mapping for term in self.terms for name, mapping in term.mappings().items()}:
            save_mappings(checkpoint, mappings)

    def load_extra_state(self, checkpoint: Path) -> None:
        mappings = load_mappings(checkpoint)
        for term in self.terms:
            term.resume(mappings)

    def write_cache(self, folder: str | Path, method: Method | None = None, batch_size: int | None = None) -> Manifest:
        """Writes what the teacher says about the rows of all data sets into a store; returns its manifest.

        All processes come here. A writing that was interrupted goes on, and a store gets the texts that it lacks.
        `teacher_model="cache:folder"` reads it, with the settings and rows of this trainer (docs/cache.md).

        Args:
            folder (`str` or `Path`): of the store; new, or of one that this teacher has written.
            method ([`~hf_distill.teachers.writing.Method`], *optional*): what is kept; by default hidden states.
            batch_size (`int`, *optional*): texts of a forward; `per_device_eval_batch_size` by default.

        Raises:
            `ValueError`: no single model as teacher, a folder of anything else, too little room.
        """
        return store_writer(self, method or Method(), batch_size).write(Path(folder))

    # ------------------------------------------------------------------------------------------------ descriptions

    def run_settings(self) -> dict[str, Any]:
        return {"teacher": self.teacher.name}

    def describe_run(self) -> dict[str, str]:
        described = super().describe_run()
        rows = described.pop("rows per update")
        teachers = {f"teacher {name}": text for name, text in describe_teachers(self.teachers).items()}
        return {**described, **teachers, "rows per update": rows}

    def describe(self) -> dict[str, str]:
        """Teacher, loss and settings, for the model card."""
        params = "".join(f", {name} {value}" for name, value in self.divergence_params.items())
        combination = {"combination of the teachers": self.args.teacher_combination} if len(self.teachers) > 1 else {}
        more = {f"{name} over the training": str(values) for name, values in keywords(self.args.schedule).items()}
        more |= describe_sources(self.teachers)
        for term in self.terms:
            more |= term.describe()
        return {
            "teacher": self.teacher.name,
            **combination,
            "divergence": self.args.divergence + params,
            "temperature": str(self.args.temperature),
            "weight of the divergence (`kd_weight`)": str(self.args.kd_weight),
            "weight of the hard labels": str(1 - self.args.kd_weight),
            **more,
        }
