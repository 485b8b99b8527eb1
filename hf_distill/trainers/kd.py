"""KDTrainer: TRL's SFTTrainer with a teacher. The heart is `compute_loss`; the rest loads, checks, counts and saves."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer
from trl.data_utils import get_dataset_column_names

from hf_distill.kv_projector import Projectors
from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import describe_mapping, load_mappings, save_mappings
from hf_distill.losses.cross_tokenizer import AlignedSignal, cross_tokenizer_loss
from hf_distill.losses.divergence import check_divergence
from hf_distill.losses.fused_linear import DistillationLoss, Head, TeacherSignal, fused_distillation_loss
from hf_distill.metrics import TokenMeans, as_json, sum_dtype
from hf_distill.modeling import (
    causal_lm,
    check_head,
    drop_unreadable_padding,
    expose_hidden_states,
    gathered,
    keep_4bit_weights,
    label_positions,
    load_balancing_loss,
    select_positions,
)
from hf_distill.saved_weights import load_weights
from hf_distill.saving import (
    keep_paths_off_the_card,
    mend_generation_config,
    name_bases_absolutely,
    portable,
    set_aside,
)
from hf_distill.teachers import Signal, Teacher
from hf_distill.teachers.local import BASE
from hf_distill.token_rows import Limits
from hf_distill.trainers.checkpoints import (
    CheckpointTiming,
    checkpoints,
    find_checkpoint,
    leave_sigterm_to_the_trainer,
    naming,
    noticing_sigterm,
    problem_of,
    replacing,
    rotate,
    settle_leftovers,
    try_saving_run,
)
from hf_distill.trainers.checks import (
    PEEKED_ROWS,
    AnyDataset,
    as_it_came,
    check_best_metric,
    check_lengths,
    has_load_balancing,
    is_of_a_library,
    named_datasets,
    named_teachers,
    refuse_batch,
    refuse_frozen,
    refuse_layers,
    refuse_lost_processes,
    refuse_other_layers,
    refuse_output_dir,
    refuse_prompt_learning,
    refuse_row_columns,
    refuse_sharding,
    refuse_split,
    refuse_vision,
    student_tokenizer,
)
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.data import (
    as_they_are,
    brought,
    check_chat_template,
    check_columns,
    checked,
    formatted,
    one_format,
    over_datasets,
    refuse_no_label,
    with_label,
)
from hf_distill.trainers.hidden_layers import HiddenLayers
from hf_distill.trainers.packing import check_packing
from hf_distill.trainers.resuming import other_run, save_run, tell_differing_settings
from hf_distill.trainers.teacher_set import TeacherSet

logger = logging.getLogger(__name__)

PROBE_ROWS = 16
# How the metrics of an evaluation begin, beside those of subclasses.
EVALUATED = (
    "loss", "kd", "ce", "agreement", "student_entropy", "aux_loss", "alignment/", "runtime", "samples_per_second",
    "steps_per_second",
)  # fmt: skip
OPTIONAL_SUMS = ("hidden", "alignment/exact_fraction", "alignment/compared_fraction")

# So many halvings take the loss scaler's first scale, 2^16, below 1: what is not finite then never will be.
MAX_SKIPPED_UPDATES = 20


class KDTrainer(SFTTrainer):
    """Trains a student on the teacher's next-token distributions and on hard labels.

    `loss = kd_weight * T^2 * D_T(teacher, student) + (1 - kd_weight) * CE`, averaged over the label-bearing tokens of
    the whole accumulated batch of all processes (Hinton et al., 1503.02531; other divergences: `docs/losses.md`).
    Everything else is `trl.SFTTrainer`: dataset formats, chat templates, packing, PEFT, evaluation, hub.

    Args:
        model (`str` or `PreTrainedModel`): the student, as hub id, local path or model.
        teacher_model (`str` or `PreTrainedModel`, or a list or dict of them):
            The teacher. By name it is loaded in the dtype it was saved in. It is frozen, in eval mode, never saved.
            Several are combined as `args.teacher_combination` says; a dict names them. "base" is the student's own base
            model, with its adapters switched off.
        args ([`KDConfig`], *optional*): settings; by default those of `KDConfig` with an output directory.
        train_dataset (`Dataset` or `IterableDataset`): any TRL format: text, prompt/completion, messages, input_ids.
        eval_dataset (`Dataset`, `IterableDataset` or a dict of them, *optional*): measured with the same loss.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer, by default loaded with it.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The teacher's tokenizer, by default loaded with it. For several teachers a list or dict, or one for all that
            bring none.
        data_collator, peft_config, quantization_config, callbacks, optimizers, formatting_func:
            As in `trl.SFTTrainer`.

    Raises:
        `ValueError`: at construction, for anything that could not be trained on: no teacher, the student as its own
            teacher, another vocabulary, missing columns, no row with a label, a teacher without weights, vision
            models, and what [`KDConfig`] refuses.
    """

    args: KDConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase

    _crosses_tokenizers = True
    _evaluated: tuple[str, ...] = ()  # how the metrics begin that only this trainer has
    _tag_names = ["hf_distill", "knowledge-distillation"]
    _name = "KD"
    _paper = {
        "title": "Distilling the Knowledge in a Neural Network",
        "id": "1503.02531",
        "citation": "@article{hinton2015distilling,\n"
        "    title   = {{Distilling the Knowledge in a Neural Network}},\n"
        "    author  = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},\n"
        "    year    = 2015,\n"
        "    journal = {arXiv preprint arXiv:1503.02531}\n}",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | Sequence[Any] | Mapping[str, Any] | None = None,
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
    ):
        args = KDConfig(output_dir="kd_output") if args is None else args
        if not isinstance(args, KDConfig):
            raise ValueError(f"args has to be a KDConfig, got {type(args).__name__}; KDConfig takes the same fields")
        refuse_lost_processes(args)
        refuse_sharding(args, teacher_model)
        check_best_metric(
            args, eval_dataset, (*EVALUATED, *self._evaluated, *(["hidden"] if args.has_hidden else [])),
            is_open=any(not is_of_a_library(type(part)) for part in (self, *(callbacks or ()))),
        )  # fmt: skip
        teachers, tokenizers = named_teachers(teacher_model, teacher_processing_class, args)
        if any(model is teacher and not isinstance(model, str) for teacher in teachers.values()):
            raise ValueError("the teacher is the student object itself; load the model twice to distil it into itself")
        refuse_prompt_learning(peft_config, model, *teachers.values())
        refuse_vision(model, processing_class)
        refuse_split(model)
        has_adapters = peft_config is not None or isinstance(model, PeftModel)
        refuse_output_dir(model, teachers, args, has_adapters=has_adapters)
        for name, dataset in named_datasets(train_dataset, eval_dataset).items():
            self.check_columns(dataset, name, args, formatting_func is not None)
            refuse_row_columns(dataset, name, args)

        # The teacher comes first: what is wrong with it is told before the student is loaded and the data tokenised.
        processing_class = processing_class or student_tokenizer(model, args)
        skip_prepare = (args.dataset_kwargs or {}).get("skip_prepare_dataset")  # pyright: ignore[reportAttributeAccessIssue]
        is_read = not skip_prepare and formatting_func is None
        unprepared = named_datasets(train_dataset, eval_dataset) if is_read else {}
        for name, dataset in unprepared.items():
            if args.chat_template_path is None:
                check_chat_template(dataset, name, args, processing_class, "the student's", "chat_template_path")
        for layers in self._layer_settings(args, teachers):
            refuse_layers(layers, model, teachers, args)
        if BASE in teachers.values() and not has_adapters:
            raise ValueError("teacher_model='base' needs a student with adapters: pass a peft_config (--use_peft)")
        self.teacher_set = TeacherSet(
            teachers, tokenizers, model, processing_class, args, crosses=self._crosses_tokenizers,
            has_adapters=peft_config is not None, datasets=unprepared,
        )  # fmt: skip
        self.teachers, self.vocab_size = self.teacher_set.by_name, self.teacher_set.vocab_size
        self._as_it_came = as_it_came(model, processing_class, args)

        if skip_prepare:
            # What no model can read would fail in the middle of training.
            function = partial(as_they_are, limits=self._limits(args, None), args=args)
            train_dataset, eval_dataset = over_datasets(function, train_dataset, eval_dataset)
        elif formatting_func is None:
            # Before SFTTrainer looks at a row to see what it is.
            function = partial(self._brought, args=args)
            train_dataset, eval_dataset = over_datasets(function, train_dataset, eval_dataset)

        if isinstance(model, str) and args.device.type == "cuda" and args.world_size == 1:
            # TRL would spread the student over all GPUs, the teacher's too.
            args = copy.copy(args)
            args.model_init_kwargs = {"device_map": {"": args.device}, **(args.model_init_kwargs or {})}  # pyright: ignore
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )

        self.divergence_params = check_divergence(args.divergence, args.divergence_params)  # pyright: ignore[reportArgumentType]
        # compute_loss divides by the label-bearing tokens of the whole update, whatever the student's forward takes.
        self.model_accepts_loss_kwargs = True
        self._means: dict[str, TokenMeans] = {}
        self._hard_means: dict[str, TokenMeans] = {}
        self._paired_means: dict[str, TokenMeans] = {}
        for mode in ("train", "eval"):
            self._reset_means(mode)
        self._update_loss, self._skipped_updates = 0.0, 0
        self._has_told_tokens = False
        self._first_update = 0  # of this call of train(), which counts tokens from there
        self._sigterm: list[int] = []
        self.tried_packings: set[bool] = set()  # which ways of joining rows the models have been tried with
        self.student = student = causal_lm(self.model)
        refuse_vision(student, None)
        refuse_frozen(self.model)
        keep_4bit_weights(student)
        with self.trying_out():
            check_head(student, "student")
            self.aux_loss_enabled = self.aux_loss_enabled and has_load_balancing(student, args)
        expose_hidden_states(student)
        self.teacher: Teacher = self.teacher_set.combined(self.model, self.accelerator)
        refuse_split(student)
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy if self.is_fsdp_enabled else None
        if policy is not None:
            # FSDP would round the loss, and the sums that are logged, to the dtype of the weights.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)
        for dataset in named_datasets(self.train_dataset, self.eval_dataset).values():
            self.data_collator = self.teacher_set.collator(self.data_collator, dataset)
            check_packing(self, dataset)
            check_lengths(self, dataset)
        self.projectors = Projectors()
        self.hidden_layers = HiddenLayers(self) if args.has_hidden else None
        name_bases_absolutely(self.model)
        self._own_folders: set[Path] = set()
        self._try_saving()

    @contextmanager
    def trying_out(self) -> Iterator[None]:
        """Within it the student is whole, and in the precision that it is trained in; all processes come here."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        with gathered(self.student), torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    @staticmethod
    def _layer_settings(args: KDConfig, teachers: Mapping[str, Any]) -> list[Any]:
        """The layer-mapping settings."""
        if args.has_hidden and len(teachers) > 1:
            raise ValueError("hidden_weight needs one teacher, whose layers the student's learn from; set it to 0")
        return [args.hidden_layers] if args.has_hidden else []

    # ------------------------------------------------------------------------------------------------- the heart

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The loss of a micro-batch, a scalar: its share of the mean over the whole update's label-bearing tokens."""
        inputs = dict(inputs)
        self._check_batch(inputs)
        positions, labels = label_positions(inputs.pop("labels"))  # (N,)
        hard_labels = inputs.pop("hard_labels", labels)  # (N,): a student's own samples are no hard labels
        signals = self.teacher_signal(inputs, positions)
        num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch

        def with_hidden(outputs: Any, head: Head) -> dict[str, Tensor]:
            hidden = select_positions(outputs.last_hidden_state, positions)  # (N, Ds)
            terms = self.distillation_terms(hidden, head, signals, hard_labels, num_items)
            if aligned := [signal for signal in signals if isinstance(signal, AlignedSignal)]:
                compared = [(s.spans.student_groups >= 0).sum() for s in aligned]
                terms["alignment/exact_fraction"] = sum(s.num_exact for s in aligned) / len(aligned)  # pyright: ignore
                terms["alignment/compared_fraction"] = sum(compared) / len(aligned)  # pyright: ignore
            if self.hidden_layers is not None:
                terms["hidden"] = self.hidden_layers.loss(outputs.hidden_states, signals[0], positions)  # pyright: ignore
                weight = self.setting("hidden_weight") / torch.as_tensor(num_items).clamp(min=1)
                terms["loss"] = terms["loss"] + weight.to(hidden.device) * terms["hidden"]
            if self.aux_loss_enabled:
                mask = inputs.get("attention_mask")
                terms["aux_loss"] = load_balancing_loss(causal_lm(self.model), outputs, mask)
            return terms

        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        if self.hidden_layers is not None:
            more["output_hidden_states"] = True
        terms = model(**inputs, **more, with_hidden=with_hidden)

        loss = terms["loss"]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The divisor counts the tokens of all processes, and the engine averages gradients over processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * terms["aux_loss"] / steps
        self._record(loss, terms, inputs, hard_labels)
        if self.model.training:
            self._update_loss += loss.detach()
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                self._stop_unless_finite()  # DeepSpeed's backward steps the optimizer
        if return_outputs:
            with torch.no_grad():
                return loss, model(**inputs, use_cache=False)
        return loss

    def teacher_signal(self, inputs: dict[str, Any], positions: Tensor) -> Sequence[Signal]:
        """What the teachers say at flat `positions` (N,) of a batch; what it takes for that leaves `inputs`."""
        return self.teacher(*self.teacher_view(inputs, positions))

    @staticmethod
    def teacher_view(inputs: dict[str, Any], positions: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What the teacher reads, and the positions (N,) there: its own prompt before the same completion, if any."""
        own = {name: inputs.pop(name) for name in list(inputs) if name.startswith("teacher_")}
        if "teacher_input_ids" not in own:
            return inputs | own, positions
        positions, _ = label_positions(own.pop("teacher_labels"))
        view = {name: own.pop(f"teacher_{name}") for name in ("input_ids", "attention_mask")}
        return view | own, positions

    def distillation_terms(
        self, hidden: Tensor, head: Head, signals: Sequence[Signal], labels: Tensor, num_items: Tensor | int
    ) -> dict[str, Tensor]:
        """Loss and sums over N label-bearing positions, inside the student's forward.

        Args:
            hidden (`torch.Tensor` of shape `(N, Ds)`), head (`Head`): the student's.
            signals (sequence of `Signal`): each teacher's hidden states (N, Dt) and head.
            labels (`torch.Tensor` of shape `(N,)`): the tokens that follow, -100 for no hard label.
            num_items: label-bearing tokens of the whole update, the divisor.
        """
        device = head.weight.device
        changing = {name: self.setting(name) for name in self.args.schedule or ()}
        params = self.divergence_params | {name: changing[name] for name in changing if not hasattr(self.args, name)}
        is_constant = not changing.keys() & {"kd_weight", "temperature", *params}
        options = {
            "kd_weight": self.setting("kd_weight"),
            "temperature": self.setting("temperature"),
            "divergence": self.args.divergence,
            "divergence_params": params,
            "num_items": torch.as_tensor(num_items, device=device).clamp(min=1),
            "chunk_size": self.args.loss_chunk_size,
            "checked": True,
        }
        hidden, labels = hidden.to(device), labels.to(device)
        signals = [signal._replace(hidden=signal.hidden.to(device)) for signal in signals]
        same = [signal for signal in signals if isinstance(signal, TeacherSignal)]
        results = []
        if same:
            is_sum = self.args.teacher_combination == "sum"
            # Of a sum, these may be a part: others have another tokenizer.
            share = sum(signal.weight for signal in same) if is_sum else 1.0  # pyright: ignore
            found = fused_distillation_loss(
                hidden, head, [signal._replace(weight=signal.weight / share) for signal in same], labels,
                combination="sum" if is_sum else "mixture",
                vocab_size=self.vocab_size, compiled=is_constant, **options,
            )  # fmt: skip
            results.append((share, found))
        for signal in signals:
            if isinstance(signal, AlignedSignal):
                found = cross_tokenizer_loss(
                    hidden, head, signal.hidden, signal.head, labels, signal.spans, signal.shared,
                    method=signal.method, **options,
                )  # fmt: skip
                results.append((signal.weight, found))
        names = DistillationLoss._fields[:-1]
        return {name: sum(weight * getattr(found, name) for weight, found in results) for name in names}  # pyright: ignore

    def layer_mappings(self) -> dict[str, LayerMapping]:
        """Which layers the student's learn from, as it was when it began; kept in checkpoints."""
        return {} if self.hidden_layers is None else {"hidden states": self.hidden_layers.mapping}

    def use_layer_mappings(self, mappings: dict[str, LayerMapping]) -> None:
        """Goes on with those of a checkpoint; `ValueError` for others than the settings name."""
        if self.hidden_layers is None or "hidden states" not in mappings:
            return
        if self.args.hidden_layers != "cka":
            refuse_other_layers(mappings["hidden states"], self.hidden_layers.mapping)
        self.hidden_layers.use(mappings["hidden states"], self.teacher)  # pyright: ignore[reportArgumentType]

    def setting(self, name: str) -> float:
        """A setting as the schedule has it now; in evaluations, which would not compare otherwise, at its end."""
        if name not in (self.args.schedule or {}):
            return getattr(self.args, name)
        is_training = self.model.training and self.state.max_steps > 0
        return self._setting_of(name, self.state.global_step) if is_training else self.args.scheduled(name, 1.0)

    def _setting_of(self, name: str, step: int) -> float:
        return self.args.scheduled(name, step / max(self.state.max_steps - 1, 1))

    def _check_batch(self, inputs: Mapping[str, Any]) -> None:
        # Rows have been checked when they were prepared. What a collator or a transform makes of them has not.
        refuse_batch(inputs, "", self.vocab_size, self.vocab_size, self.processing_class.pad_token_id)  # pyright: ignore
        if "teacher_input_ids" in inputs:
            refuse_batch(inputs, "teacher_", self.teacher_set.num_token_ids(), self.vocab_size, None)

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
        batch = self.data_collator(self.first_rows(self.train_dataset, PROBE_ROWS))
        device = self.student.device
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, Tensor)}
        self._check_batch(inputs)
        positions, _ = label_positions(inputs.pop("labels"))
        return inputs, positions

    # --------------------------------------------------------------------------------------------------- metrics

    def _record(self, loss: Tensor, terms: dict[str, Tensor], inputs: dict[str, Any], hard_labels: Tensor) -> None:
        num_labels = hard_labels.numel()
        mode = "train" if self.model.training else "eval"
        sums = {name: terms[name] for name in ("kd", "student_entropy")}
        sums |= {name: terms[name] for name in OPTIONAL_SUMS if name in terms}
        if self.aux_loss_enabled:
            sums["aux_loss"] = terms["aux_loss"] * num_labels
        if mode == "eval":
            # transformers averages a batch's loss over rows; this replaces it by the mean over tokens.
            sums["loss"] = loss * num_labels
        self._means[mode].add(num_labels, **sums)
        self._hard_means[mode].add((hard_labels != -100).sum(), ce=terms["ce"])
        self._paired_means[mode].add(terms["num_paired"], agreement=terms["agreement"])
        if mode == "train":
            mask = inputs.get("attention_mask")
            self._total_train_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()

    def _is_logging(self, mode: str) -> bool:
        """Whether what costs more than a sum is measured in this update: it would not be logged otherwise."""
        step = self.state.global_step + 1
        if mode == "eval" or (step == 1 and self.args.logging_first_step):
            return True
        return self.args.logging_strategy != "no" and step % max(self.state.logging_steps, 1) == 0

    def _reset_means(self, mode: str) -> None:
        """A fresh start for what is logged of "train" or "eval"; trainers with more to log add theirs here."""
        self._means[mode], self._hard_means[mode], self._paired_means[mode] = TokenMeans(), TokenMeans(), TokenMeans()

    def _pop_means(self, mode: str) -> dict[str, float]:
        """What is logged of "train" or "eval" since the last time; called by all processes."""
        # Without any hard label there is no "ce", without any token that faces just one no "agreement".
        means = (self._means[mode], self._hard_means[mode], self._paired_means[mode])
        return {name: value for part in means for name, value in part.pop(self._sum_over_processes).items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update({name: as_json(value) for name, value in logs.items()})
        # "loss" is in the record of a logging step, which every process makes at the same step.
        if "loss" in logs:
            logs.update(self._pop_means("train"))
            last = max(self.state.global_step - 1, 0)  # the update that has just been made
            logs.update({f"schedule/{name}": self._setting_of(name, last) for name in self.args.schedule or ()})
            device = self.accelerator.device
            tokens = torch.as_tensor(self._total_train_tokens, device=device).to(sum_dtype(device))
            logs["num_tokens"] = self._sum_over_processes(tokens.unsqueeze(0)).item()
            if not self._has_told_tokens:
                self._has_told_tokens = True
                updates = max(self.state.global_step - self._first_update, 1)
                self._tell(f"about {logs['num_tokens'] / updates:,.0f} tokens per update")
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        splits = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if splits and self.model_wrapped is self.model and not isinstance(self.model, FSDPModule):
            raise ValueError(
                "FSDP and DeepSpeed prepare a model together with its optimizer, so nothing can be evaluated before "
                "the training: set eval_on_start=True, or evaluate without them"
            )
        self._reset_means("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._pop_means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})  # pyright: ignore
        return output

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs):
        if description == "Evaluation":
            self.data_collator = self.teacher_set.collator(self.data_collator, dataset)
            check_packing(self, dataset)  # of an evaluation's own rows
            check_lengths(self, dataset)
            dataset = self._fill_up(dataset, batch_size) if isinstance(dataset, Dataset) else dataset
        loader = super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)  # pyright: ignore
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's are wrapped around the one that works
        inner.worker_init_fn = partial(leave_sigterm_to_the_trainer, then=inner.worker_init_fn)
        return loader

    def _fill_up(self, dataset: Dataset, batch_size: int) -> Any:
        """Adds rows without a label until every process has as many: accelerate would repeat rows, which then count."""
        missing = -len(dataset) % (batch_size * self.accelerator.num_processes)
        if self.accelerator.num_processes == 1 or missing == 0 or (filler := self.filler(dataset[0])) is None:
            return dataset
        return concatenate_datasets([dataset, Dataset.from_list([filler] * missing, features=dataset.features)])

    def filler(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """A row like this one that counts for nothing; None where there is no telling."""
        masked: dict[str, Any] = {
            name: [-100] * len(row[name]) for name in row if name.endswith("labels") and row[name]
        }
        masked |= {name: 0 for name in row if name.endswith("_exact")}
        return {**row, **masked} if "labels" in row else None

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        return self.accelerator.reduce(totals, reduction="sum")  # pyright: ignore

    # ------------------------------------------------------------------------------------------ runs that survive

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `trl.SFTTrainer`; whatever stops it, the student is saved to `emergency/` in the output directory.

        Raises:
            `SystemExit`: with code 0, for SIGTERM: the update has been finished and a checkpoint saved.
            `ValueError`: there is no whole checkpoint to resume from.
        """
        if self.args.should_save:
            settle_leftovers(str(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir), self._checkpoint_problem)
        (checkpoint,) = broadcast_object_list([checkpoint])  # a network's folders do not look the same everywhere
        self._first_update = 0
        if checkpoint is None and self.args.should_save and (others := checkpoints(Path(str(self.args.output_dir)))):
            logger.warning(
                "%s holds checkpoints of another run, up to %s: after the first update all of its files are moved "
                "aside. To go on with it, pass resume_from_checkpoint=True", self.args.output_dir, others[-1].name,
            )  # fmt: skip
        if checkpoint is not None:
            self._first_update = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
            self._own_folders.add(Path(checkpoint).absolute().parent.resolve())
            self.use_layer_mappings(load_mappings(Path(checkpoint)))
            if self.is_world_process_zero():
                tell_differing_settings(Path(checkpoint), self)
        if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):  # which one process cannot look into, once split
            # Again, for what has been changed since the construction.
            self._try_saving(with_card=self.args.save_strategy != "no")
        self._tell(", ".join(f"{name}: {value}" for name, value in self.describe_run().items()))
        self._reset_means("train")  # nothing of an interrupted run
        self._update_loss, self._skipped_updates, self._has_agreed_to_stop = 0.0, 0, False
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            # An evaluation before the training has marked the model as prepared without wrapping it: every process
            # would train a student of its own.
            self.model._is_accelerate_prepared = False  # pyright: ignore
            self.accelerator._models.clear()
        self.remove_callback(CheckpointTiming)
        # After those that may want a checkpoint.
        make_room = partial(self.make_own, str(self.args.output_dir))
        self.add_callback(CheckpointTiming(self._is_told_to_stop, make_room, self._own_folders))
        with self.projectors.attached(self.student), noticing_sigterm() as self._sigterm:
            try:
                return super().train(checkpoint, *args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                self._save_emergency(error)
                if self.accelerator.num_processes > 1:
                    error.add_note(
                        f"process {self.args.process_index} of {self.accelerator.num_processes}; if it has lost a "
                        "connection, another process has failed first, and its message is the one to read (a killed "
                        "one has none)"
                    )
                raise
            finally:
                self._as_it_came.restore(self.model)

    def describe_run(self) -> dict[str, str]:
        """What really runs, which is not always what was asked for."""
        processes, micro_batches = self.accelerator.num_processes, self.args.gradient_accumulation_steps
        teachers = self.teacher_set.local()
        rows = self.args.per_device_train_batch_size * micro_batches * processes
        return {
            "processes": str(processes),
            "engine": self.engine,
            "student": f"{self.student.dtype}, mixed precision {self.accelerator.mixed_precision}, {self.args.device}",
            **{f"teacher {name}": "the student without its adapters" for name in self.teachers if name not in teachers},
            **{f"teacher {name}": f"{teacher.model.dtype}, {teacher.place}" for name, teacher in teachers.items()},
            "rows per update": f"{rows} ({micro_batches} micro-batches)",
        }

    @property
    def engine(self) -> str:
        """The engine that spreads the training over processes."""
        if self.is_deepspeed_enabled:
            return f"DeepSpeed ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "FSDP2" if self.is_fsdp_enabled else "DDP" if self.accelerator.num_processes > 1 else "none"

    def _tell(self, message: str) -> None:
        if self.is_world_process_zero():
            logger.info(message)
            if not logger.isEnabledFor(logging.INFO):
                Console(stderr=True).print(message, highlight=False)

    def _is_told_to_stop(self) -> bool:
        return self._has_agreed_to_stop if self.accelerator.num_processes > 1 else bool(self._sigterm)

    def _run_epoch(self, *args, **kwargs):
        # A run that was killed after its last checkpoint has nothing left to do; transformers would make an update.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    _staging = ""  # where a checkpoint is being written, below the output directory

    def _checkpoint_problem(self, checkpoint: Path) -> str | None:
        return problem_of(checkpoint) or self.projectors.misfit(checkpoint) or other_run(checkpoint, self)

    def _get_output_dir(self, trial):
        return str(Path(super()._get_output_dir(trial), self._staging))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        with replacing(checkpoint, self.args.should_save, self.accelerator.wait_for_everyone) as staged:
            self._staging = staged.parent.name
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = ""
            if self.args.should_save:
                save_run(staged, self)
                if mappings := self.layer_mappings():
                    save_mappings(staged, mappings)
            # transformers has looked for the best checkpoint where this one is written.
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best == checkpoint or best.exists():
                self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, {checkpoint, Path(self.state.best_model_checkpoint or "")})
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # when it is in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_emergency(self, error: BaseException) -> None:
        folder = Path(str(self.args.output_dir), "emergency")
        if self.state.global_step == 0 and folder.exists():
            return  # A run that failed to start has nothing to save over the student of an earlier one.
        # Only a non-finite loss stops all processes at the same place. From anywhere else a student that is spread
        # over them cannot be collected: the others may wait for something else, or be gone.
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if not (isinstance(error, FloatingPointError) if sharded else self.args.should_save):
            return
        try:
            with replacing(folder, self.args.should_save) as staged:
                self.save_model(str(staged), _internal_call=True)  # without it, it would be pushed to the hub
            logger.error("training stopped at step %d; the student is saved in %s", self.state.global_step, folder)
        except Exception as second:  # noqa: BLE001 - what has stopped the training is raised
            logger.error(
                "training stopped at step %d, and the student is not saved: %r", self.state.global_step, second
            )

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        self.projectors.give_own_group(optimizer, self.args.projector_learning_rate)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Checkpoints name themselves.
        with nullcontext() if _internal_call else naming(Path(output_dir or str(self.args.output_dir))):
            super().save_model(output_dir, _internal_call)

    def _try_saving(self, with_card: bool = False) -> None:
        # Not what a subclass adds: it may copy the model, upload it, or need what is not there yet.
        card = partial(KDTrainer.create_model_card, self) if with_card else None
        try_saving_run(self, partial(KDTrainer._save, self), card)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or str(self.args.output_dir)
        self.make_own(folder)
        with (
            self.projectors.detached(self.student),
            self._as_it_came.restored(self.model, self.processing_class),
            portable(self.processing_class),
        ):
            drop_unreadable_padding(self.student)
            mend_generation_config(self.student)
            super()._save(folder, state_dict and self.projectors.without(state_dict))
        self.projectors.save(folder, is_writer=self.args.should_save)
        if self.args.should_save:
            keep_paths_off_the_card(folder)

    def make_own(self, folder: str) -> None:
        """Moves aside what another run has left in a folder, before this one writes to it."""
        place, source = Path(folder).resolve(), self.student.config.name_or_path
        if self.args.should_save and place not in self._own_folders and place != Path(source or os.devnull).resolve():
            set_aside(place)
        self._own_folders.add(place)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:  # Its checkpoints, as DeepSpeed's, hold the student and what is attached to it.
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_student(resume_from_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        # Callbacks add theirs as they come; the best one is a part of every checkpoint's state.
        return super()._determine_best_metric({name: as_json(value) for name, value in metrics.items()}, trial)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        if not os.path.isdir(str(self.state.best_model_checkpoint)):
            return logger.warning("%s is gone: the last weights stay", self.state.best_model_checkpoint)
        self._load_student(str(self.state.best_model_checkpoint))

    def _load_student(self, checkpoint: str) -> None:
        with self.projectors.detached(self.student):
            load_weights(self.model, checkpoint)
        self.projectors.load(checkpoint)

    def _get_grad_norm(self, model, grad_norm=None):
        # transformers calls this once per update, right before the optimizer's step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        scaler = self.accelerator.scaler
        # With float16's loss scaling a non-finite gradient is everyday: the scaler skips that step and halves its
        # scale. DeepSpeed has stepped by now, and has a limit of its own; compute_loss has checked its loss.
        ignored = self.is_deepspeed_enabled
        if scaler is not None and scaler.is_enabled():
            self._skipped_updates = 0 if torch.as_tensor(grad_norm).isfinite() else self._skipped_updates + 1
            ignored = ignored or self._skipped_updates < MAX_SKIPPED_UPDATES
        self._stop_unless_finite(0.0 if ignored else grad_norm)
        return grad_norm

    def _stop_unless_finite(self, grad_norm: Any = 0.0) -> None:
        # One reduction: in the same update all processes learn that a loss is not finite, and that one is to stop.
        sums = (self._update_loss, len(self._sigterm))
        loss, signals = self._sum_over_processes(
            torch.stack([torch.as_tensor(value, device=self.args.device).float() for value in sums])
        )
        self._update_loss, self._has_agreed_to_stop = 0.0, bool(signals > 0)
        if not torch.isfinite(loss + torch.as_tensor(grad_norm).to(loss)):
            in_a_row = self._skipped_updates >= MAX_SKIPPED_UPDATES
            skipped = f", in {MAX_SKIPPED_UPDATES} updates in a row" if in_a_row else ""
            raise FloatingPointError(
                f"non-finite training at step {self.state.global_step + 1}: loss {loss.item()}, gradient norm "
                f"{torch.as_tensor(grad_norm).item()}{skipped}. The optimizer has not stepped; checkpoints up to this "
                "step are intact. Try a lower learning rate or temperature, or bf16 instead of fp16, and look at the "
                "rows of this step"
            )

    # ------------------------------------------------------------------------------------------------------ data

    check_columns = staticmethod(check_columns)
    _brought = staticmethod(brought)

    def _limits(self, args: SFTConfig, max_length: int | None) -> Limits:
        return Limits(
            self.vocab_size, teacher_ids=self.teacher_set.num_token_ids(), max_length=max_length,
            completion_masks=args.completion_only_loss is not False,
        )  # fmt: skip

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        self.check_columns(dataset, dataset_name, args, formatting_func is not None)  # an evaluation brings its own
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
            dataset = self._prepare_dataset(dataset, processing_class, alone, False, formatting_func, dataset_name)
            formatting_func, is_tokenized = None, True
        elif is_tokenized:  # by the numbers that its rows have for the caller
            dataset = checked(dataset, dataset_name, self._limits(args, args.max_length), args)
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        limits = self._limits(args, None)
        kept = with_label(prepared, dataset_name, None if is_tokenized else limits, args)
        if isinstance(dataset, Dataset):
            refuse_no_label(kept, dataset_name, args)
            if not packing and (dropped := len(dataset) - len(kept)):
                logger.warning("%d of %d %s rows have no label and are dropped", dropped, len(dataset), dataset_name)
        elif not packing:
            first = dataset.take(PEEKED_ROWS)
            first = super()._prepare_dataset(first, processing_class, args, False, formatting_func, dataset_name)
            refuse_no_label(with_label(first, dataset_name, limits, args), dataset_name, args)
        return self.teacher_set.prepared(kept, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, *self.teacher_set.columns()})

    # ------------------------------------------------------------------------------------------------ model card

    def create_model_card(self, *args, **kwargs) -> None:
        self.make_own(str(self.args.output_dir))
        super().create_model_card(*args, **kwargs)
        path = f"{self.args.output_dir}/README.md"
        if self.is_world_process_zero() and os.path.exists(path):
            card = ModelCard.load(path)
            rows = "\n".join(f"| {name} | {value} |" for name, value in self.describe().items())
            card.text += f"\n\n## Distillation\n\n| setting | value |\n|---|---|\n{rows}\n"
            card.save(path)

    def describe(self) -> dict[str, str]:
        """What was distilled from what and how, for the model card."""
        params = "".join(f", {name} {value}" for name, value in self.divergence_params.items())
        quantization = f" ({self.args.teacher_quantization})" if self.args.teacher_quantization else ""
        combination = {"combination of the teachers": self.args.teacher_combination} if len(self.teachers) > 1 else {}
        more = {f"{name} over the training": str(values) for name, values in (self.args.schedule or {}).items()}  # pyright: ignore
        if methods := self.teacher_set.methods():
            more["other tokenizers"] = ", ".join(f"{name}: {method}" for name, method in methods.items())
        if self.hidden_layers is not None:
            layers = describe_mapping(self.hidden_layers.mapping)
            more["hidden states"] = f"{self.args.hidden_loss}, weight {self.args.hidden_weight:g}, layers {layers}"
        return {
            "teacher": self.teacher.name + quantization,
            **combination,
            "divergence": self.args.divergence + params,
            "temperature": str(self.args.temperature),
            "weight of the divergence (`kd_weight`)": str(self.args.kd_weight),
            "weight of the hard labels": str(1 - self.args.kd_weight),
            **more,
        }
