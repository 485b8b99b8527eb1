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
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import DataCollator, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names

from hf_distill.losses.hard import hard_label_loss
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.model_files import is_adapter_folder
from hf_distill.modeling import (
    check_head,
    evaluating,
    expose_hidden_states,
    gathered,
    keep_4bit_weights,
    label_positions,
    last_hidden_states,
    load_balancing_loss,
    select_positions,
)
from hf_distill.named import student_positions, student_rows, student_tokenizer
from hf_distill.token_rows import PEEKED_ROWS, Limits, Room, check_batch, without_long_rows
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
    refuse_prompt_learning,
    refuse_sharding,
    refuse_split,
    refuse_vision,
)
from hf_distill.trainers.data import (
    as_they_are,
    brought,
    check_columns,
    checked,
    cut_labels,
    filled_up,
    formatted,
    one_format,
    refuse_no_label,
    tell_lost_labels,
    tell_uncounted,
    with_label,
    without_fillers,
)
from hf_distill.trainers.given import Given, Reader
from hf_distill.trainers.hard_label_config import HardLabelConfig, keywords
from hf_distill.trainers.input_checks import check_inputs
from hf_distill.trainers.packing import check_packing, joins
from hf_distill.trainers.surviving import SurvivingTrainer

logger = logging.getLogger(__name__)

PROBE_ROWS = 16
# How the metrics of every evaluation begin.
EVALUATED = ("loss", "ce", "student_entropy", "aux_loss", "runtime", "samples_per_second", "steps_per_second")


class HardLabelTrainer(SurvivingTrainer):
    """Trains a student on hard labels, as `trl.SFTTrainer` does, exactly, and in runs that survive.

    `loss = CE`, averaged over the label-bearing tokens of the whole accumulated batch of all processes. It is the
    baseline of a distillation: the same rows, loss and updates as [`KDTrainer`] without its teacher. Arguments that are
    not listed here are those of `trl.SFTTrainer`.

    Construction has four steps: the checks of all that can be checked before anything is loaded (`check`), what has to
    be loaded before the student, SFTTrainer's own construction, and the probes of the loaded student (`start` has the
    last two).

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
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer, by default loaded with it.

    Raises:
        `ValueError`: at construction, for anything that could not be trained on: missing columns, no row with a label,
            vision models, and what [`HardLabelConfig`] refuses.
    """

    args: HardLabelConfig

    _evaluated: tuple[str, ...] = ()  # how the metrics of an evaluation begin that only this trainer has
    _config: type[HardLabelConfig] = HardLabelConfig
    _output_dir = "sft_output"
    _tag_names = ["hf_distill", "sft"]
    _name = "SFT"

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
        refuse_vision(model, given.processing_class)
        refuse_split(model)
        for name, dataset in given.datasets().items():
            self.check_rows(dataset, name, args, given.formatting_func is not None)
            refuse_packed_evaluation(name, args)
        given.check_arguments()
        given = given.with_adapters_loaded()
        tokenizer = given.processing_class or student_tokenizer(given.model, args)
        given = given._replace(processing_class=tokenizer)
        given.check_tokens()
        if args.chat_template_path is None:
            given.check_chat_template(given.processing_class, "the student's", "chat_template_path")
        # Before SFTTrainer looks at a row to see what it is.
        return given.with_rows(partial(self._brought, args=args)) if given.unprepared() else given

    @classmethod
    def evaluated(cls, args: Any) -> tuple[str, ...]:
        """The beginnings of the names of an evaluation's metrics."""
        return (*EVALUATED, *cls._evaluated)

    def check_rows(self, dataset: AnyDataset, name: str, args: Any, has_formatting: bool) -> None:
        """Raises `ValueError` for the columns of a data set that cannot be trained on."""
        check_columns(dataset, name, args, has_formatting)

    def start(self, given: Given, *, vocab_size: int) -> None:
        """The last two steps: SFTTrainer's own construction, and the probes of the loaded student.

        Args:
            given ([`Given`]): from `check`.
            vocab_size (`int`): token ids below this may be labels.
        """
        args = given.args
        # Before SFTTrainer's construction, which prepares the rows.
        self.vocab_size, self._positions = vocab_size, student_positions(given.model, args)
        as_given = as_it_came(given.model, given.processing_class, args)
        if args.skips_preparation:
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
        self.tried_packings: set[bool] = set()  # which ways of joining rows the models have been tried with
        refuse_vision(self.student, None)
        refuse_frozen(self.model)
        keep_4bit_weights(self.student)
        with self.trying_out():
            check_head(self.student, "student")
            self.aux_loss_enabled = self.aux_loss_enabled and has_load_balancing(self.student, args)
        expose_hidden_states(self.student)
        self.attach()
        refuse_split(self.student)
        for dataset in named_datasets(self.train_dataset, self.eval_dataset).values():
            self.check_readers(dataset)
        self._try_saving()

    def batch_collator(self) -> Any:
        """The collator of whole batches; `data_collator` makes the student's side of them."""
        return self.data_collator

    def attach(self) -> None:
        """Part of the last step: what a trainer adds to the loaded student, before rows are tried out on it."""

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

        return [Reader("student", self.student, read)]

    def check_readers(self, dataset: Any) -> None:
        """Raises `ValueError` for prepared rows that one of the models would not read as they are meant."""
        readers = self.readers()
        rows = self.first_rows(dataset, 2)
        is_packed = bool(rows) and "seq_lengths" in rows[0]
        if is_packed not in self.tried_packings and joins(self.data_collator, rows):
            check_packing(readers, self.data_collator, is_packed, self.vocab_size, self.args.device)
            self.tried_packings.add(is_packed)
        check_lengths(readers, dataset, self.args, self.trying_out)

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
            return {"loss": found.loss, "ce": found.ce, "student_entropy": found.student_entropy}

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
        check_batch(inputs, "", self.vocab_size, self.vocab_size, self.processing_class.pad_token_id)
        positions, labels = label_positions(inputs.pop("labels"))
        return inputs, positions, labels

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
            with_hidden: makes the terms, `loss` among them, of the backbone's outputs and the head.
            hard_labels (`torch.Tensor` of shape `(N,)`): -100 for none.
            forward: further keyword arguments of the forward.
        """
        if self.aux_loss_enabled:
            forward["output_router_logits"] = True

        def terms_of(outputs: Any, head: Head) -> dict[str, Any]:
            terms = with_hidden(outputs, head)
            if self.aux_loss_enabled:
                terms["aux_loss"] = load_balancing_loss(self.student, outputs, inputs.get("attention_mask"))
            return terms

        terms = model(**inputs, **forward, with_hidden=terms_of)
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

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # The divisor counts what `label_positions` finds. transformers also counts first tokens, which nothing
        # predicts, where a class has no loss type (GPT-2); what is called `shift_labels` it takes as it is.
        labels = [batch["labels"] for batch in batch_samples if "labels" in batch]
        shifted = [{"labels": each, "shift_labels": each[..., 1:]} for each in labels]
        return super()._get_num_items_in_batch(shifted, device)

    def first_rows(self, dataset: Any, number: int) -> list[dict[str, Any]]:
        """The first rows of a data set, with the columns that the collator is given in training."""
        self._set_signature_columns_if_needed()
        rows = islice(iter(dataset), number)
        if not self.args.remove_unused_columns:
            return [dict(row) for row in rows]
        return [{name: row[name] for name in row if name in self._signature_columns} for row in rows]

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

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"):
        """As in `trl.SFTTrainer`, of rows that need not be prepared: they are prepared as `evaluate` does it."""
        if not self.args.skips_preparation:
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            test_dataset = self._prepare_dataset(
                test_dataset, self.processing_class, self.args, packing, self._formatting_func, metric_key_prefix
            )
        return without_fillers(super().predict(test_dataset, ignore_keys, metric_key_prefix), test_dataset)

    # --------------------------------------------------------------------------------------------------------- rows

    _brought = staticmethod(brought)

    def limits(self, args: SFTConfig, max_length: int | None) -> Limits:
        """The ids, labels and lengths that rows may have."""
        masks = args.completion_only_loss is not False
        return Limits(self.vocab_size, max_length=max_length, completion_masks=masks)

    def rooms(self, columns: set[str]) -> list[Room]:
        """The tokens that the models can read of the student's rows; `columns` are those of the rows."""
        return [Room("the student", self._positions)]

    def _without_long_rows(self, dataset: Any, name: str, args: Any) -> Any:
        rooms = self.rooms(set(next(iter(dataset), {}))) if args.drop_long_rows else []
        return without_long_rows(dataset, name, rooms, args.dataset_num_proc)

    def prepare_rows(self, dataset: Any, name: str, args: Any) -> Any:
        """Rows of token ids and labels, as the trainer needs them; trainers add columns of theirs here."""
        return dataset

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = self._tokenized(dataset, processing_class, args, packing, formatting_func, dataset_name)
        return self.prepare_rows(dataset, dataset_name, args)

    def _tokenized(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Rows of token ids and labels, checked, and packed if asked; those without a label are dropped."""
        self.check_rows(dataset, dataset_name, args, formatting_func is not None)  # an evaluation brings its own
        columns = get_dataset_column_names(dataset)
        is_tokenized, is_packed = "input_ids" in columns, "seq_lengths" in columns
        if not is_tokenized:
            if formatting_func is not None:
                dataset, formatting_func = formatted(dataset, dataset_name, args, formatting_func), None
            dataset = one_format(dataset, dataset_name, args)
        packing = packing and not is_packed
        if packing:
            # Rows are dropped and counted before they are joined. Of the strategies, only "bfd" cuts at max_length.
            alone = copy.copy(args)
            alone.shuffle_dataset, alone.truncation_mode = False, "keep_start"
            alone.max_length = args.max_length if args.packing_strategy == "bfd" else None
            dataset = self._tokenized(dataset, processing_class, alone, False, formatting_func, dataset_name)
            formatting_func, is_tokenized = None, True
        elif is_tokenized:  # by the numbers that its rows have for the caller
            dataset = checked(dataset, dataset_name, self.limits(args, args.max_length), args)
        whole, cut = dataset, None
        if isinstance(dataset, Dataset) and not packing and args.max_length is not None:
            # In two steps, so that it can be told what is cut off.
            uncut = copy.copy(args)
            uncut.max_length, uncut.shuffle_dataset = None, False
            whole = super()._prepare_dataset(dataset, processing_class, uncut, False, formatting_func, dataset_name)
            assert isinstance(whole, Dataset)
            cut, formatting_func = cut_labels(whole, dataset_name, args), None
        prepared = super()._prepare_dataset(whole, processing_class, args, packing, formatting_func, dataset_name)
        limits = self.limits(args, None)
        kept = with_label(prepared, dataset_name, None if is_tokenized else limits, args)
        if isinstance(dataset, Dataset):
            assert isinstance(kept, Dataset)
            refuse_no_label(kept, dataset_name, args, cut)
            if not packing:
                tell_lost_labels(dataset.num_rows, dataset.num_rows - kept.num_rows, dataset_name, cut, args)
        elif not packing:
            first = dataset.take(PEEKED_ROWS)
            first = super()._prepare_dataset(first, processing_class, args, False, formatting_func, dataset_name)
            refuse_no_label(with_label(first, dataset_name, limits, args), dataset_name, args)
            tell_uncounted(dataset_name, args)
        return kept if packing else self._without_long_rows(kept, dataset_name, args)

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training: bool = False, **kwargs):
        if not is_training:
            self.check_readers(dataset)  # of an evaluation's own rows
            processes = self.accelerator.num_processes
            dataset = filled_up(dataset, batch_size * processes, self.filler) if processes > 1 else dataset
        own, self.data_collator = self.data_collator, self.batch_collator()
        try:
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = own

    def filler(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """A row like this one that counts for nothing; None where there is no telling."""
        return {**row, "labels": [-100] * len(row["labels"])} if "labels" in row else None
