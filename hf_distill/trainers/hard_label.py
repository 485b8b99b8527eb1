"""HardLabelTrainer: training on hard labels alone, the baseline of every distillation, and what all trainers share.

Rows are checked, the student's head is probed, the loss never makes dense logits, and all numbers are means over the
label-bearing tokens.

Shapes: B batch, T tokens, N label-bearing positions, V vocabulary, Ds hidden width.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import DataCollator, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_distill.losses.hard import hard_label_loss
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.model_files import is_adapter_folder
from hf_distill.modeling import (
    check_head,
    evaluating,
    expose_hidden_states,
    gathered,
    is_vision_language,
    keep_4bit_weights,
    label_positions,
    last_hidden_states,
    load_balancing_loss,
    num_positions,
    select_positions,
    spare_frozen_tower,
    trying,
)
from hf_distill.named import student_positions, student_rows
from hf_distill.picture_batches import spans_of
from hf_distill.picture_rows import columns_of
from hf_distill.teachers.columns import PREFIX
from hf_distill.teachers.rows import Reader, TeacherRows
from hf_distill.trainers.checks import (
    AnyDataset,
    as_it_came,
    check_best_metric,
    check_lengths,
    has_load_balancing,
    is_of_a_library,
    named_datasets,
    refuse_frozen,
    refuse_lost_processes,
    refuse_output_dir,
    refuse_packed_evaluation,
    refuse_processing_class,
    refuse_prompt_learning,
    refuse_sharding,
    refuse_sight,
    refuse_split,
)
from hf_distill.trainers.data import as_they_are, refuse_too_few
from hf_distill.trainers.given import Given
from hf_distill.trainers.hard_label_config import HardLabelConfig, keywords
from hf_distill.trainers.input_checks import check_inputs
from hf_distill.trainers.label_counts import LabelCounts
from hf_distill.trainers.packing import check_packing, joins
from hf_distill.trainers.pictures import (
    freeze_tower,
    keep_batches_whole,
    kept_to_language,
    picture_rows,
    refuse_flat_places,
    refuse_for_pictures,
    refuse_pixels,
    refuse_student,
    student_collator,
    try_rows,
)
from hf_distill.trainers.preparing import PreparingTrainer

logger = logging.getLogger(__name__)

PROBE_ROWS = 16
# How the metrics of every evaluation begin.
EVALUATED = ("loss", "ce", "student_entropy", "aux_loss", "runtime", "samples_per_second", "steps_per_second")


class HardLabelTrainer(PreparingTrainer):
    """Trains a student on hard labels, as `trl.SFTTrainer` does, exactly, and in runs that survive.

    `loss = CE`, averaged over the label-bearing tokens of the whole accumulated batch of all processes. It is the
    baseline of a distillation: the same rows, loss and updates as [`KDTrainer`] without its teacher. Arguments that are
    not listed here are those of `trl.SFTTrainer`.

    Construction has four steps: the checks of all that can be checked before anything is loaded (`check`); what has to
    be loaded before the student, here nothing; SFTTrainer's own construction and the probes of the student (`start`);
    what a trainer adds to the loaded student (`attach`), and the tried rows (`try_run`).

    Attributes:
        student (`PreTrainedModel`): the causal language model inside `model`, which adapters and engines are around.
        vocab_size (`int`): token ids below this may be labels; ids past it get no probability.
        projectors, means and all else: [`SurvivingTrainer`] and `trl.SFTTrainer`.

    Args:
        model (`str` or `PreTrainedModel`):
            The student, as hub id, local path or model. A folder of adapters is trained on in these adapters.
        args ([`HardLabelConfig`], *optional*): settings, by default with an output directory.
        train_dataset (`Dataset` or `IterableDataset`): any TRL format: text, prompt/completion, messages, input_ids.
        eval_dataset (`Dataset`, `IterableDataset` or a dict of them, *optional*): measured with the same loss.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The student's tokenizer, or its processor of pictures and texts, by default loaded with it.

    Raises:
        `ValueError`: at construction, for anything that could not be trained on: missing columns, no row with a label,
            pictures that no model sees, and what [`HardLabelConfig`] refuses.
    """

    args: HardLabelConfig

    _evaluated: tuple[str, ...] = ()  # how the metrics of an evaluation begin that only this trainer has
    _config: type[HardLabelConfig] = HardLabelConfig
    _output_dir = "sft_output"
    _sees = True  # whether rows may have pictures
    _tag_names = ["hf_distill", "sft"]
    _name = "SFT"
    _count_positions: Callable[[Any], int | None] = staticmethod(num_positions)  # that a text may have

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: HardLabelConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
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
        given = self.check(given)
        self.start(given, vocab_size=student_rows(given.model, given.args))
        self.attach()
        self.try_run()

    # ------------------------------------------------------------------------------------------- steps of construction

    @classmethod
    def settings(cls, args: Any) -> Any:
        """The settings; by default all of them. `ValueError` for those of another trainer."""
        args = cls._config(output_dir=cls._output_dir) if args is None else args
        if not isinstance(args, cls._config):
            name = cls._config.__name__
            raise ValueError(f"args has to be a {name}, got {type(args).__name__}; {name} takes the same fields")
        if hasattr(args, "kd_weight") and not hasattr(cls._config, "kd_weight"):
            raise ValueError(f"{cls.__name__} has no teacher, but got a {type(args).__name__}: pass a HardLabelConfig")
        return args

    def check(self, given: Given, teachers: Mapping[str, Any] | None = None) -> Given:
        """The first step: refuses what could not be trained on, before any weights are loaded.

        Args:
            given ([`Given`]): what the trainer was called with.
            teachers: hub ids, paths or models by name, of a trainer that has some.

        Returns:
            The same with the student's tokenizer and rows of one format, and the student itself if it was a folder of
            adapters.
        """
        model, args, teachers = given.model, given.args, teachers or {}
        refuse_lost_processes(args)
        refuse_sharding(args)
        refuse_output_dir(model, teachers, args, has_adapters=given.has_adapters or is_adapter_folder(model))
        check_inputs(model, given.train_dataset, given.eval_dataset, args, given.peft_config)
        is_open = any(not is_of_a_library(type(part)) for part in (self, *(given.callbacks or ())))
        is_open = is_open or given.compute_metrics is not None
        check_best_metric(args, given.eval_dataset, self.evaluated(args), is_open=is_open)
        refuse_prompt_learning(given.peft_config, model, *teachers.values())
        refuse_processing_class(given.processing_class)
        given = self._check_pictures(given, teachers)
        refuse_split(model)
        for name, dataset in given.datasets().items():
            self.check_rows(dataset, name, args, given.formatting_func is not None)
            refuse_packed_evaluation(name, args)
        given.check_arguments()
        given = given.with_adapters_loaded().with_processing_class()
        given.check_tokens()
        if args.chat_template_path is None:
            given.check_chat_template(given.processing_class, "the student's", "chat_template_path")
            given.check_assistant_marks()
        # Before SFTTrainer looks at a row to see what it is.
        prepares = given.unprepared() and not given.has_pictures
        return given.with_rows(partial(self._brought, args=args)) if prepares else given

    def _check_pictures(self, given: Given, teachers: Mapping[str, Any]) -> Given:
        """A part of the first step: `picture_rows`, and adapters for the language part of the student alone."""
        args, model = given.args, given.model
        if not self._sees:
            name = type(self).__name__
            models = {"student": model, **teachers}
            refuse_sight(name, models, given.processing_class, args, pictures=given.has_pictures)
            return given
        if args.freeze_vision_tower:
            given = given._replace(peft_config=kept_to_language(given.peft_config, model, args))
        if not given.has_pictures:
            return given
        refuse_student(model, given.processing_class, args)
        columns = set(columns_of(given.train_dataset))
        refuse_for_pictures(args, columns, given.formatting_func is not None)
        return given.with_rows(partial(picture_rows, args=args))

    @classmethod
    def evaluated(cls, args: Any) -> tuple[str, ...]:
        """The beginnings of the names of an evaluation's metrics."""
        return (*EVALUATED, *cls._evaluated)

    def start(self, given: Given, *, vocab_size: int, teacher_rows: TeacherRows | None = None) -> None:
        """The third step: SFTTrainer's own construction, and the probes of the loaded student.

        Args:
            given ([`Given`]): from `check`.
            vocab_size (`int`): token ids below this may be labels.
            teacher_rows ([`TeacherRows`], *optional*): what teachers need of the rows.
        """
        args = given.args
        # Before SFTTrainer's construction, which prepares the rows.
        self.vocab_size = vocab_size
        self._positions = student_positions(given.model, args, self._count_positions)
        self.teacher_rows = TeacherRows() if teacher_rows is None else teacher_rows
        as_given = as_it_came(given.model, given.processing_class, args)
        self.has_pictures = given.has_pictures
        self.label_counts = LabelCounts(self._as_predicted)
        if args.skips_preparation or self.has_pictures:
            # Rows that no model can read would fail in the middle of training.
            given = given.with_rows(partial(as_they_are, limits=self.limits(args, None), args=args))
            given = given.with_rows(partial(self._without_long_rows, args=args))
            given = given.with_rows(partial(self.prepare_rows, args=args))
        if isinstance(given.model, str) and args.device.type == "cuda" and args.world_size == 1:
            # TRL would spread the student over all GPUs, those of others too.
            args = copy.copy(args)
            args.model_init_kwargs = {"device_map": {"": args.device}, **keywords(args.model_init_kwargs)}
        super().__init__(**given._replace(args=args)._asdict(), as_it_came=as_given)

        # compute_loss divides by the label-bearing tokens of the whole update, whatever the student's forward takes.
        self.model_accepts_loss_kwargs = True
        self._tried_pictures: set[str] = set()  # the data sets whose rows have been made batches of
        self.tried_packings: set[bool] = set()  # which ways of joining rows the models have been tried with
        if args.freeze_vision_tower and not given.has_adapters and (told := freeze_tower(self.student)):
            self._tell(told)
        spare_frozen_tower(self.student)
        refuse_frozen(self.model)
        self.picture_spans = spans_of(self.processing_class, self.student.config)
        if is_vision_language(self.student):
            is_own = given.data_collator is not None or not self.has_pictures
            if self.has_pictures or given.data_collator is not None:
                keep_batches_whole(self.accelerator)
            self.data_collator = student_collator(self.data_collator, self.picture_spans, args, is_own)
        keep_4bit_weights(self.student)
        with self.trying_out():
            check_head(self.student, "student")
            self.aux_loss_enabled = self.aux_loss_enabled and has_load_balancing(self.student, args)
        expose_hidden_states(self.student)

    def attach(self) -> None:
        """The last step begins: what a trainer adds to the loaded student, before rows are tried out on it."""

    def try_run(self) -> None:
        """The last step ends: all models read some rows, and everything but the weights is saved once."""
        refuse_split(self.student)
        refuse_too_few(self.train_dataset, self.args)
        for dataset in self._named_datasets().values():
            self.check_readers(dataset)
        self._try_saving()

    @contextmanager
    def trying_out(self) -> Iterator[None]:
        """Within it the student is whole, and in the precision that it is trained in; all processes come here."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        with gathered(self.student), torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def readers(self) -> list[Reader]:
        """The models that read the student's rows."""

        def read(batch: dict[str, Any]) -> Tensor:
            with self.trying_out(), evaluating(self.student):
                return last_hidden_states(self.student, **batch).flatten(0, 1)

        return [Reader("student", self.student, read), *self.teacher_rows.readers(self.args.device)]

    def check_readers(self, dataset: Any) -> None:
        """Raises `ValueError` for prepared rows that one of the models would not read as they are meant."""
        self.teacher_rows.keep_columns(dataset)
        if self.has_pictures:
            name = next((n for n, each in self._named_datasets().items() if each is dataset), "held-out")
            if name not in self._tried_pictures:
                try_rows(self, dataset, name)
            self._tried_pictures |= {name} - {"held-out"}
            return
        readers = self.readers()
        rows = self.first_rows(dataset, 2)
        is_packed = bool(rows) and "seq_lengths" in rows[0]
        if is_packed not in self.tried_packings and joins(self.data_collator, rows):
            check_packing(readers, self.data_collator, is_packed, self.vocab_size, self.args.device)
            self.tried_packings.add(is_packed)
        check_lengths(readers, dataset, self.args, self.trying_out)

    def _named_datasets(self) -> Mapping[str, Any]:
        return named_datasets(self.train_dataset, self.eval_dataset)

    def try_reading(self, inputs: dict[str, Any]) -> None:
        """Raises `ValueError` for a batch with pictures that the student cannot read."""
        names = [name for name in inputs if name.startswith(PREFIX)]
        own = {name: each for name, each in inputs.items() if name not in names}
        with (
            torch.no_grad(),
            self.trying_out(),
            evaluating(self.student),
            trying(
                f"the student ({type(self.student).__name__}) cannot read the batches of its processor "
                f"({type(self.processing_class).__name__}): do they belong together?"
            ),
        ):
            last_hidden_states(self.student, **own)

    # ---------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The loss of a micro-batch, a scalar: its share of the mean over the whole update's label-bearing tokens."""
        inputs, positions, labels = self.take_labels(inputs)
        num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        objective = self.objective(num_items)

        def with_hidden(outputs: Any, head: Head) -> dict[str, Any]:
            hidden = select_positions(outputs.last_hidden_state, positions)  # (N, Ds)
            found = hard_label_loss(hidden, head, labels, objective)
            terms = {"loss": found.loss, "ce": found.ce, "student_entropy": found.student_entropy}
            return self.with_aux_loss(terms, outputs, inputs)

        return self.finish(model, inputs, with_hidden, labels, num_items_in_batch, return_outputs)

    def objective(self, num_items: Tensor | int) -> Objective:
        """The loss's settings in this update; `num_items` is the number of its label-bearing tokens."""
        return Objective(
            kd_weight=0.0, num_items=num_items, vocab_size=self.vocab_size, chunk_size=self.args.loss_chunk_size,
            checked=True,
        )  # fmt: skip

    def take_labels(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """A batch without its labels, its label-bearing positions (N,), flat, and the labels (N,) that follow them."""
        inputs = dict(inputs)
        # Rows have been checked when they were prepared. What a collator or a transform makes of them has not.
        number = self.label_counts(inputs)
        positions, labels = label_positions(inputs.pop("labels"), number)
        return inputs, positions, labels

    def _as_predicted(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, int, int, int | None]:
        """The arguments of [`check_batch`]: a batch with ids that can be predicted, and limits of ids and labels."""
        if is_vision_language(self.student):  # what stands for pictures need not be a token that can be predicted
            ids = inputs["input_ids"]
            refuse_flat_places(self.student, inputs)
            inputs = {**inputs, "input_ids": ids.masked_fill(self.picture_spans(ids), 0)}
        else:
            refuse_pixels(self.student, inputs)
        return inputs, "", self.vocab_size, self.vocab_size, self.tokenizer.pad_token_id

    def finish(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        with_hidden: Callable[[Any, Head], dict[str, Any]],
        hard_labels: Tensor,
        num_items_in_batch: Tensor | int | None,
        return_outputs: bool,
        **forward: Any,
    ) -> Any:
        """The student's forward, in which the loss is computed, and what all losses share: scale, record, watch.

        Args:
            inputs: the batch for the student.
            with_hidden: makes the terms, `loss` among them, of the backbone's outputs and the head, and ends with
                `with_aux_loss`.
            hard_labels (`torch.Tensor` of shape `(N,)`): -100 for none.
            forward: further keyword arguments of the forward.
        """
        if self.aux_loss_enabled:
            forward["output_router_logits"] = True
        terms = model(**inputs, **forward, with_hidden=with_hidden)
        loss = terms.pop("loss")
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The divisor counts the tokens of all processes, and the engine averages gradients over processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * terms["aux_loss"] / steps
        self._record(loss, terms, inputs, hard_labels)
        if self.model.training:
            self.watch_loss(loss)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**inputs, use_cache=False)
        return loss

    def with_aux_loss(self, terms: dict[str, Any], outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The terms with the load-balancing loss of a mixture of experts, if the student is trained with one."""
        if self.aux_loss_enabled:
            terms["aux_loss"] = load_balancing_loss(self.student, outputs, inputs.get("attention_mask"))
        return terms

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # The divisor counts what `label_positions` finds. transformers also counts first tokens, which nothing
        # predicts, where a class has no loss type (GPT-2); what is called `shift_labels` it takes as it is.
        labels = [batch["labels"] for batch in batch_samples if "labels" in batch]
        shifted = [{"labels": each, "shift_labels": each[..., 1:]} for each in labels]
        return super()._get_num_items_in_batch(shifted, device)

    def probe_batch(self) -> tuple[dict[str, Any], Tensor]:
        """A few training rows as a batch on the student's device, and its label-bearing positions."""
        batch = self.batch_collator()(self.first_rows(self.train_dataset, PROBE_ROWS))
        device = self.student.device
        inputs, positions, _ = self.take_labels(
            {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, Tensor)}
        )
        return inputs, positions

    # ------------------------------------------------------------------------------------------------------ metrics

    def _record(self, loss: Tensor, terms: dict[str, Any], inputs: dict[str, Any], hard_labels: Tensor) -> None:
        """Adds the sums of a micro-batch to the means."""
        mode = "train" if self.model.training else "eval"
        num_labels = hard_labels.numel()
        self.add_means(mode, "hard labels", (hard_labels != -100).sum(), ce=terms.pop("ce"))
        if "agreement" in terms:
            self.add_means(mode, "pairs", terms.pop("num_paired"), agreement=terms.pop("agreement"))
        own = {"student_entropy": terms.pop("student_entropy")}
        if self.aux_loss_enabled:
            # As in the loss: micro-batches of an update count the same, in evaluations the tokens do.
            auxiliary = terms.pop("aux_loss")
            if mode == "train":
                self.add_means(mode, "micro-batches", 1, aux_loss=auxiliary)
            else:
                own["aux_loss"] = auxiliary * num_labels
        if mode == "eval":
            # transformers averages a batch's loss over rows; this replaces it by the mean over tokens.
            own["loss"] = loss * num_labels
        self.add_means(mode, "labels", num_labels, **own)
        if terms:  # those of a signal, which not every update needs to have
            self.add_means(mode, "signals", num_labels, **terms)
        if mode == "train":
            mask = inputs.get("attention_mask")
            self._total_train_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
