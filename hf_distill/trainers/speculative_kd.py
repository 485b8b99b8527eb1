"""SpeculativeKDTrainer: KDTrainer on text that student and teacher write together, made anew for every update."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_distill.collators import PromptCollator, pad_prompts, warn_of_truncation
from hf_distill.metrics import RolloutMeans
from hf_distill.modeling import (
    CachedReader,
    CompiledReader,
    CompiledStep,
    Reader,
    WholeCopy,
    check_cache,
    num_steady_positions,
)
from hf_distill.speculative import Block, verified_rollout
from hf_distill.teachers import Signal, TeacherAway, WritingTeacher
from hf_distill.teachers.columns import PREFIX, AnyDataset, take_columns
from hf_distill.teachers.kinds import steady_positions
from hf_distill.teachers.opening import refuse_as_writer, require_writers
from hf_distill.token_rows import PEEKED_ROWS, Room, pad, without_long_rows
from hf_distill.trainers.checks import eos_token_ids, named_datasets
from hf_distill.trainers.data import refuse_unread, tell_cut_completions
from hf_distill.trainers.given import Given
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.papers import SPECULATIVE_KD
from hf_distill.trainers.speculative_kd_config import HARD_SOURCES, ROLLOUT_SOURCES, SpeculativeKDConfig
from hf_distill.verifying import Evidence, Verifier

logger = logging.getLogger(__name__)

# The columns of an encoded row, of either collator.
ENCODED = Features(
    {
        "student_prompt_ids": List(Value("int64")),
        "teacher_prompt_ids": List(Value("int64")),
        "completion_ids": List(Value("int64")),
        "knowledge_truncated": Value("bool"),
    }
)


@dataclass
class Row:
    """One row of an update. A filler, which makes processes even, has no teacher's prompt."""

    student_prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)  # those of the data set, then those written
    source: str = ""
    drafted: list[bool] = field(default_factory=list)  # whether a token is the student's own
    evidence: Evidence = field(default_factory=dict)  # (C, ...), until the row is part of a batch


class SpeculativeKDTrainer(KDTrainer):
    """Distils on text written for every update by student and teacher together (speculative KD, Xu et al., 2410.11325).

    The student drafts, the teacher replaces what it holds unlikely; the loss compares both on every token of the
    result. With a [`LUPICollator`] the teacher writes and judges with knowledge in its prompt that the student never
    sees. The rows may also come from the student alone (on-policy, GKD, 2306.13649), from the teacher alone
    (sequence-level KD, 1606.07947) or from the data set, in the shares of `rollout_mix`. Arguments that are not listed
    here are those of [`KDTrainer`].

    Args:
        args ([`SpeculativeKDConfig`], *optional*): settings.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with `prompt` (text or messages) and, for the source "dataset", `completion`; rows with `messages`,
            whose last turn, if it is the assistant's, is the completion; or what `data_collator` reads.
        data_collator ([`LUPICollator`], *optional*): for rows with a query and knowledge for the teacher alone.

    Raises:
        `ValueError`: at construction, what [`KDTrainer`] refuses; rows without prompt, or without the completion that
            the mix asks for; prompts that leave no room for `max_new_tokens`; no end-of-sequence token; models that
            cannot take back what they have read.
    """

    args: SpeculativeKDConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher: WritingTeacher  # pyright: ignore[reportIncompatibleVariableOverride]

    _config = SpeculativeKDConfig
    _output_dir = "speculative_kd_output"
    _evaluated = ("rollout/",)
    _count_positions = staticmethod(num_steady_positions)  # texts are read in pieces
    _sees = _crosses_tokenizers = False  # what one side writes, the other has to read token by token
    _tag_names = [*KDTrainer._tag_names, "speculative-knowledge-distillation"]
    _name = "Speculative KD"
    _paper = SPECULATIVE_KD

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: SpeculativeKDConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        args = self.settings(args)
        if data_collator is not None and not hasattr(data_collator, "encode"):
            raise ValueError("data_collator has to make prompts: a LUPICollator, or none for rows with a prompt")
        if kwargs.get("formatting_func") is not None:
            raise ValueError("formatting_func is not used: give the rows a 'prompt' column, or pass a LUPICollator")
        if data_collator is not None:
            own: PreTrainedTokenizerBase = data_collator.tokenizer
            processing_class = processing_class or own
            if own.get_vocab() != processing_class.get_vocab():
                raise ValueError("data_collator has another tokenizer than the trainer: pass the same to both")
        refuse_as_writer(teacher_model, args)
        # Before SFTTrainer's construction, which prepares the rows.
        self._prompts = data_collator
        # Evaluations measure generated text, unless none is generated.
        written = {name: share for name, share in args.shares.items() if name != "dataset"}
        self._mixes = {"train": args.shares, "eval": written if sum(written.values()) else args.shares}
        self.last_rows: list[Row] = []  # what has been written last, for callbacks
        self.eval_rows: list[Row] = []  # all that the last evaluation has written
        self._rollout_means = {"train": RolloutMeans(), "eval": RolloutMeans()}
        super().__init__(model, teacher_model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self.data_collator = self._prompts or PromptCollator(self.processing_class)
        self.eos_token_ids = eos_token_ids(self.processing_class, self.student, self.teacher)
        self.pad_token_id: int = self.processing_class.pad_token_id
        with self.trying_out():
            check_cache(self.student, "student")
        # A process that writes longer texts makes more forwards: nobody would gather their layers with it.
        splits = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        self._whole_student = WholeCopy(self.model) if splits else None
        self._reader = self._compiled_reader(splits) if args.rollout_compile else CachedReader
        if args.top_k > self.vocab_size:
            raise ValueError(f"top_k={args.top_k} is more than the vocabulary has tokens ({self.vocab_size})")
        remembers, drafts = self.teacher.remembers, {}
        self._measures_privilege = remembers if args.value_of_privilege is None else args.value_of_privilege
        if not remembers and args.draft_length is None:
            drafts = {"draft_length": args.max_new_tokens}
            self._tell("drafts go on to the end of the text: the teacher reads all of it for every check")
        if not remembers and args.value_of_privilege is None and _is_privileged(next(iter(self.train_dataset or ()))):
            self._tell("rollout/value_of_privilege is not measured: value_of_privilege=True asks the teacher once more")
        # The student alone: one draft of any length, kept whatever the teacher thinks. The teacher alone: no draft.
        alone = {"draft_length": args.max_new_tokens, "adaptive": False, "top_k": self.vocab_size, "min_prob": 0.0}
        self._rollout_configs = {
            "speculative": args.rollout_config(**drafts),
            "student": args.rollout_config(**alone),
            "teacher": args.rollout_config(draft_length=0),
            "dataset": args.rollout_config(**alone),  # nothing is rejected there either
        }
        prompt = torch.zeros(1, 1, dtype=torch.long)
        for source in (name for name, share in args.shares.items() if share):
            self._verifier(prompt, prompt + 1, source)  # what this teacher cannot do is told here

    def _compiled_reader(self, splits: bool) -> Reader:
        """The student with a compiled step, for the largest batch and the longest prompt; says what it will cost."""
        if splits:
            raise ValueError("rollout_compile needs a student that is not split: leave it out with FSDP and ZeRO-3")
        datasets = named_datasets(self.train_dataset, self.eval_dataset).values()
        prompts = chain(*(each["student_prompt_ids"] for each in datasets if isinstance(each, Dataset)))
        longest = max(map(len, prompts), default=0)
        step = CompiledStep(self.student, self.args.most_rollout_rows, self.args.max_new_tokens, longest)
        self._tell(step.cost)
        return partial(CompiledReader, step=step)

    @staticmethod
    def _has_signal(args: Any) -> bool:
        return True  # it comes out of the rollouts

    def batch_collator(self) -> Any:
        return self.data_collator  # of prompts; what the teacher reads is among them

    def check(self, given: Given, teachers: Mapping[str, Any] | None = None) -> Given:
        require_writers(teachers or {}, "SpeculativeKDTrainer")
        given = super().check(given, teachers)
        args = given.args
        if args.eos_token is not None or args.chat_template_path is not None:
            return given  # the tokenizer gets them when the student is loaded
        return given.with_rows(partial(self._encoded, tokenizer=given.processing_class, args=args))

    # ------------------------------------------------------------------------------------------------------ data

    def check_rows(self, dataset: AnyDataset, name: str, args: Any, has_formatting: bool) -> None:
        if (row := next(iter(dataset), None)) is None:
            raise ValueError(f"the {name} dataset is empty")
        if self._prompts is None:  # whose columns may have any name
            refuse_unread(set(row), name, {"teacher_prompt", "teacher_prompt_ids"})
            if (row.get("messages") or row.get("conversations")) and row.get("prompt"):
                logger.warning("the rows of the %s dataset are read from their messages; left out: prompt", name)

    _brought = staticmethod(lambda rows, *_, **__: rows)  # collators read more formats, row by row

    def _encoded(self, dataset: AnyDataset, name: str, tokenizer: Any, args: Any) -> AnyDataset:
        """Rows of prompts and completions in token ids; `ValueError` for a row that cannot be read."""
        columns = list(next(iter(dataset)))
        needs_completion = self._mixes["train" if name == "train" else "eval"].get("dataset", 0) > 0
        collator = self._prompts or PromptCollator(tokenizer)
        function = partial(_encode, collator=collator, dataset_name=name, needs_completion=needs_completion)
        if not isinstance(dataset, Dataset):
            return dataset.map(function, with_indices=True, remove_columns=columns)
        with args.main_process_first(desc=f"encoding the {name} dataset"):
            return dataset.map(
                function, with_indices=True, remove_columns=columns, num_proc=args.dataset_num_proc, features=ENCODED,
                desc=f"Encoding prompts of {name} dataset",
            )  # fmt: skip

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if not ENCODED.keys() <= set(next(iter(dataset))):
            dataset = self._encoded(dataset, dataset_name, processing_class, args)
        new = args.max_new_tokens
        positions = {"student": self._positions, "teacher": steady_positions(cast(WritingTeacher, self.teacher))}
        rooms = [
            Room(f"the {side}, which max_new_tokens={new} follow,", limit - new, f"{side}_prompt_ids")
            for side, limit in positions.items()
            if limit is not None and args.drop_long_rows
        ]
        function = partial(
            _checked, vocab_size=self.vocab_size, positions=dict.fromkeys(positions) if rooms else positions,
            max_new_tokens=new, dataset_name=dataset_name,
        )  # fmt: skip
        reads_completions = bool(self._mixes["train"].get("dataset"))
        if not isinstance(dataset, Dataset):
            encoded = dataset.map(function, with_indices=True)
            if reads_completions:
                first = [row["completion_truncated"] for row in encoded.take(PEEKED_ROWS)]
                tell_cut_completions(first, f"first completions of the {dataset_name} stream", new)
            return without_long_rows(encoded, dataset_name, rooms)
        with args.main_process_first(desc=f"checking the {dataset_name} dataset"):
            dataset = dataset.map(
                function, with_indices=True, num_proc=args.dataset_num_proc, desc=f"Checking {dataset_name} dataset"
            )
        dataset = without_long_rows(dataset, dataset_name, rooms, args.dataset_num_proc)
        warn_of_truncation(sum(dataset["knowledge_truncated"]), len(dataset), f"{dataset_name} dataset")
        if reads_completions:
            tell_cut_completions(dataset["completion_truncated"], f"completions of the {dataset_name} dataset", new)
        dataset = dataset.remove_columns(["knowledge_truncated", "completion_truncated"])
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = list(ENCODED)

    def filler(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return {**row, "teacher_prompt_ids": []}

    # -------------------------------------------------------------------------------------------------- rollouts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # Rollouts are made here, so that transformers counts the tokens of what is really trained on.
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        written = self._written(batches, "train", self.state.global_step)
        batches = [self._prepare_inputs(batch) for batch in written]  # on the device, where micro-batches look for them
        self.label_counts.look_at(batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def prediction_step(self, model, inputs, *args, **kwargs):
        # The same random numbers at every evaluation: what changes is the model. evaluation_loop starts the count.
        (inputs,) = self._written([inputs], "eval", self._eval_batches)
        self._eval_batches += 1
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _written(self, batches: list[dict[str, Tensor]], mode: str, step: int) -> list[dict[str, Tensor]]:
        """As [`_write_batches`]; all processes stop together where the teacher of one is away."""
        written, reason = [], None
        try:
            written = self._write_batches(batches, mode, step)
        except TeacherAway as error:
            reason = str(error)
        self.stop_if_away(reason)
        return written

    def _write_batches(self, batches: list[dict[str, Tensor]], mode: str, step: int) -> list[dict[str, Tensor]]:
        """Batches of prompts as batches to train on; a function of the weights, the rows, the seed, step and rank."""
        batches_of_rows = [_rows(batch) for batch in batches]
        rows = [row for batch in batches_of_rows for row in batch if row.teacher_prompt_ids]
        entropy = self.args.seed, mode == "eval", step, self.args.process_index
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        shares = torch.tensor([float(self._mixes[mode].get(name, 0)) for name in ROLLOUT_SOURCES])
        drawn = torch.multinomial(shares, max(len(rows), 1), replacement=True, generator=generator).tolist()
        for row, index in zip(rows, drawn, strict=False):
            row.source = ROLLOUT_SOURCES[index]
        per_device = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        size = self.args.rollout_batch_size or per_device
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        whole = nullcontext(self.student) if self._whole_student is None else self._whole_student(dtype)
        with whole as student:
            for source in ROLLOUT_SOURCES:
                chosen = [row for row in rows if row.source == source]
                for start in range(0, len(chosen), size):
                    self._write(student, chosen[start : start + size], mode, generator)
        self.last_rows = rows
        if mode == "eval":
            self.eval_rows += rows
        return [self._training_batch(batch) for batch in batches_of_rows]

    def _write(self, student: PreTrainedModel, rows: list[Row], mode: str, generator: torch.Generator) -> None:
        """Gives rows of one source their completions, and the teacher's evidence, which predicts them."""
        batch = pad_prompts([vars(row) for row in rows], self.processing_class)
        ids, mask = batch.pop("completion_ids", None), batch.pop("completion_mask", None)
        prompts = batch["student_prompt_ids"], batch["student_prompt_mask"]
        source = rows[0].source
        verifier = self._verifier(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], source)
        if source == "dataset":
            assert ids is not None
            assert mask is not None  # _encode has seen to it
            drafted = torch.zeros_like(mask)
            evidence = verifier.read(ids, mask.sum(1))  # (B, C, ...)
        else:
            written = verified_rollout(
                student, verifier, *prompts, self._rollout_configs[source],
                eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id, generator=generator,
                vocab_size=self.vocab_size, student_context=self.accelerator.autocast,  # pyright: ignore[reportArgumentType]
                watch=partial(self._log_block, source) if self.args.rollout_debug else None, make_reader=self._reader,
            )  # fmt: skip
            ids, mask, drafted = (tensor.cpu() for tensor in written[:3])
            evidence = written.evidence
            self._rollout_means[mode].add(written.stats, int(mask.sum()), source == "speculative")
        # A compact copy: padding does not have to wait for the update.
        evidence = self._compact(evidence, mask)
        if self._measures_privilege and self.is_logging(mode) and any(_is_privileged(vars(row)) for row in rows):
            kl = self._value_of_privilege(*prompts, ids, mask, evidence)
            self._rollout_means[mode].add_privilege(kl, int(mask.sum()))
        lengths = mask.sum(1).tolist()
        parts = {name: found.split(lengths) for name, found in evidence.items()}
        for i, row in enumerate(rows):
            row.completion_ids = ids[i][mask[i]].tolist()
            row.drafted = drafted[i][mask[i]].tolist()
            row.evidence = {name: part[i] for name, part in parts.items()}

    def _verifier(self, prompt_ids: Tensor, prompt_mask: Tensor, source: str) -> Verifier:
        """The teacher, with the prompts and the rule of one source."""
        return self.teacher.verifier(prompt_ids, prompt_mask, self._rollout_configs[source], self.vocab_size)

    def _compact(self, evidence: Evidence, mask: Tensor) -> Evidence:
        """Evidence (B, C, ...) at the tokens of a mask (B, C), on the device of the losses: (N, ...)."""
        found = {name: tensor.to(self.args.device) for name, tensor in evidence.items()}
        return {name: tensor[mask.to(tensor.device)] for name, tensor in found.items()}

    def _training_batch(self, rows: list[Row]) -> dict[str, Tensor]:
        """Prompts and completions (B, T), right-padded, and, per label-bearing token (N,), evidence and labels."""
        ids, labels, hard_labels, evidence = [], [], [], []
        for row in rows:
            completion = row.completion_ids if row.source else []  # a filler counts for nothing
            ids.append(row.student_prompt_ids + completion)
            labels.append([-100] * len(row.student_prompt_ids) + completion)
            # The student's own samples are nobody's hard labels.
            hard_labels += completion if row.source in HARD_SOURCES else [-100] * len(completion)
            if row.evidence:
                evidence.append(row.evidence)
                row.evidence = {}  # `last_rows` stays
        input_ids, is_token = pad(ids, self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": is_token.long(),
            "labels": pad(labels, -100)[0],
            "hard_labels": torch.tensor(hard_labels, dtype=torch.long),
            **{PREFIX + name: torch.cat([each[name] for each in evidence]) for name in (evidence or [{}])[0]},
        }

    def teacher_signal(self, inputs: dict[str, Any], positions: Tensor) -> Signal | None:
        # The teacher has read every completion when it was written, after its own prompt.
        whole = take_columns(inputs)
        return self.teacher.signal(
            {name.removeprefix(PREFIX): tensor for name, tensor in whole.items() if name.startswith(PREFIX)}
        )

    # --------------------------------------------------------------------------------------------------- metrics

    def begin(self) -> None:
        super().begin()
        self._rollout_means["train"] = RolloutMeans()

    def pop_means(self, mode: str) -> dict[str, float]:
        gather: Any = self.accelerator.gather
        rollouts = self._rollout_means[mode].pop(gather, self.args.device)
        return super().pop_means(mode) | rollouts

    def _record(self, loss: Tensor, terms: dict[str, Any], inputs: dict[str, Any], hard_labels: Tensor) -> None:
        super()._record(loss, terms, inputs, hard_labels)
        mode = "train" if self.model.training else "eval"
        share = {"rollout/hard_label_fraction": (hard_labels != -100).sum()}
        self.add_means(mode, "written tokens", hard_labels.numel(), **share)

    def _value_of_privilege(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, mask: Tensor, evidence: Evidence
    ) -> Tensor:
        """The sum over completion tokens of KL(teacher with knowledge || teacher without), after the bare prompts."""
        verifier = self._verifier(prompt_ids, prompt_mask, "dataset")
        without = self._compact(verifier.read(completion_ids, mask.sum(1)), mask)
        return self.teacher.divergence(evidence, without, self.vocab_size)

    def evaluation_loop(self, *args, **kwargs):
        self._eval_batches, self._rollout_means["eval"], self.eval_rows = 0, RolloutMeans(), []
        return super().evaluation_loop(*args, **kwargs)

    def _log_block(self, source: str, block: Block) -> None:
        for i, row in enumerate(block.rows.tolist()):
            drafted, accepted = int(block.drafted[i]), int(block.accepted[i])
            tokens = block.drafts[i, :drafted].tolist()
            text = f"{source} row {row}: {self.processing_class.decode(tokens)!r}, {accepted} of {drafted} accepted"
            if accepted < drafted or drafted == 0:
                rejected = self.processing_class.decode(tokens[accepted : accepted + 1])
                text += f", {rejected!r} -> {self.processing_class.decode(block.corrections[i])!r}"
            logger.warning(text)  # what was asked for has to be seen without setting up logging

    def describe(self) -> dict[str, str]:
        shares = ", ".join(f"{name} {share:g}" for name, share in self.args.shares.items())
        draft = self._rollout_configs["speculative"].draft_length
        rule = f"draft {draft}, top_k {self.args.top_k}, min_prob {self.args.min_prob:g}"
        return {**super().describe(), "training text": shares, "speculation": rule}


def _encode(
    row: dict[str, Any], index: int, *, collator: Any, dataset_name: str, needs_completion: bool
) -> dict[str, Any]:
    """A row of token ids."""
    name = f"row {index} of the {dataset_name} dataset"
    row = row if "teacher_prompt_ids" in row else collator.encode(row, name)
    completion = row.get("completion_ids") or []
    if needs_completion and not completion:
        raise ValueError(f"{name} has no completion, and rollout_mix has a share of the source 'dataset'")
    for side in ("student", "teacher"):
        if not (ids := row[f"{side}_prompt_ids"]):
            raise ValueError(f"the {side}'s prompt of {name} is empty; it needs at least one token")
        if strange := [i for i in (*ids, *completion) if isinstance(i, bool)]:
            raise ValueError(f"{name} has token id {strange[0]}, which is no integer")
    return {
        "student_prompt_ids": row["student_prompt_ids"],
        "teacher_prompt_ids": row["teacher_prompt_ids"],
        "completion_ids": completion,
        "knowledge_truncated": row.get("knowledge_truncated", False),
    }


def _checked(
    row: dict[str, Any],
    index: int,
    *,
    vocab_size: int,
    positions: dict[str, int | None],
    max_new_tokens: int,
    dataset_name: str,
) -> dict[str, Any]:
    """A row that the models can read; its completion ends at `max_new_tokens`, as those do that are generated."""
    name = f"row {index} of the {dataset_name} dataset"
    completion = row["completion_ids"][:max_new_tokens]
    for side, limit in positions.items():
        ids = row[f"{side}_prompt_ids"]
        if strange := [i for i in (*ids, *completion) if not 0 <= i < vocab_size]:
            raise ValueError(
                f"{name} has token id {strange[0]}, but student and teacher share only the ids below "
                f"{vocab_size}: one of them cannot read it. Use tokens (eos_token, chat template) that both know"
            )
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"the {side}'s prompt of {name} ({len(ids)} tokens) and max_new_tokens={max_new_tokens} do not fit the "
                f"{side}'s {limit} positions (with longrope or dynamic scaling, those before it); lower "
                "max_new_tokens, drop_long_rows=True, or shorten rows (a LUPICollator cuts at max_prompt_length)"
            )
    return {"completion_ids": completion, "completion_truncated": len(row["completion_ids"]) > max_new_tokens}


def _rows(batch: dict[str, Tensor]) -> list[Row]:
    """The rows of a batch, without padding."""
    batch = {name: tensor.cpu() for name, tensor in batch.items()}  # at once, and not row by row
    names = [name for name in ("student_prompt", "teacher_prompt", "completion") if f"{name}_ids" in batch]
    pairs = {f"{name}_ids": zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True) for name in names}
    columns = {name: [ids[mask].tolist() for ids, mask in rows] for name, rows in pairs.items()}
    return [Row(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _is_privileged(row: dict[str, Any]) -> bool:
    """True if the teacher's prompt is another one than the student's."""
    return row["student_prompt_ids"] != row["teacher_prompt_ids"]
