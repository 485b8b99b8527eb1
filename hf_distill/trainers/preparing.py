"""A trainer that prepares its rows and batches: in one format, checked, with what the models of the run need.

It knows no loss, and of teachers only their part of rows and batches (`teacher_rows`).
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names

from hf_distill.picture_batches import FILLER, with_fillers
from hf_distill.teachers import TeacherAway
from hf_distill.teachers.columns import PREFIX, TeacherColumnsCollator, no_columns, reason_away
from hf_distill.teachers.rows import TeacherRows
from hf_distill.token_rows import COLUMNS, PEEKED_ROWS, Limits, Room, without_long_rows
from hf_distill.trainers.checkpoints import drop_loaders, end_workers
from hf_distill.trainers.checks import AnyDataset, refuse_row_columns
from hf_distill.trainers.data import (
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
from hf_distill.trainers.label_counts import LabelCounts
from hf_distill.trainers.pictures import picture_rows
from hf_distill.trainers.row_order import SeededLengthGroups, place_in_stream
from hf_distill.trainers.surviving import SurvivingTrainer

logger = logging.getLogger(__name__)


class PreparingTrainer(SurvivingTrainer):
    """A [`SurvivingTrainer`] whose rows are checked and prepared, in training and in evaluations.

    It stops between two updates if a batch comes without what a teacher says about it. Every update of a stream is a
    whole one: the batches that are left at the end of a pass are not trained on.

    Attributes:
        vocab_size (`int`): token ids below this may be labels; set before the construction of this class.
        has_pictures (`bool`): whether rows have pictures, which become tokens in the batch alone; set before, too.
        teacher_rows ([`~hf_distill.teachers.rows.TeacherRows`]): the teachers' needs; set before, too.
        label_counts ([`LabelCounts`]): counts what bears a label in a batch; set before, too.
        all else: [`SurvivingTrainer`] and `trl.SFTTrainer`.
    """

    _has_teachers = False  # whether rows have columns for teachers
    _sampler: Any = None  # of the training
    _kept_for: Any = None  # the held-out rows that loaders are kept for
    _is_new_pass = False  # whether the pass over the rows has given no batch yet, neither here nor before a resume
    _is_pass_over = False  # whether the pass has no whole update left
    _has_told_rest = False  # whether this run has warned of batches that fill no update

    vocab_size: int
    has_pictures: bool  # of the rows
    teacher_rows: TeacherRows
    label_counts: LabelCounts
    _positions: int | None  # the tokens that the student can read; set with `vocab_size`

    def check_readers(self, dataset: Any) -> None:
        """Raises `ValueError` for prepared rows that one of the models would not read as they are meant."""

    def check_rows(self, dataset: AnyDataset, name: str, args: Any, has_formatting: bool) -> None:
        """Raises `ValueError` for the columns of a data set that cannot be trained on."""
        check_columns(dataset, name, args, has_formatting)
        if self._has_teachers:
            refuse_row_columns(dataset, name, args)

    def batch_collator(self) -> Any:
        """The collator of whole batches; `data_collator` makes the student's side of them."""
        return self.teacher_rows.collator(self.data_collator)

    def loader_collator(self) -> Any:
        """The collator of training and evaluation. If the loss never needs the teachers, no server is asked in vain."""
        if self.teacher_rows.are_asked:
            return self.batch_collator()
        return TeacherColumnsCollator(self.data_collator, no_columns)

    def first_rows(self, dataset: Any, number: int) -> list[dict[str, Any]]:
        """The first rows of a data set, with the columns that the collator is given in training."""
        self._set_signature_columns_if_needed()
        rows = islice(iter(dataset), number)
        if not self.args.remove_unused_columns:
            return [dict(row) for row in rows]
        return [{name: row[name] for name in row if name in self._signature_columns} for row in rows]

    def collated(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows of a data set, by the columns that are read in training."""
        self._set_signature_columns_if_needed()
        return self.batch_collator()([{n: row[n] for n in row if n in self._signature_columns} for row in rows])

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        own = ("conversations", FILLER, self.args.dataset_text_field) if self.has_pictures else ()
        own = (*own, *sorted(self.teacher_rows.columns))
        self._signature_columns = list(dict.fromkeys((*self._signature_columns, *own)))

    def _is_prepared(self, dataset: Any) -> bool:
        """True for the data sets that the trainer was made with."""
        known = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return any(dataset is each for each in (self.train_dataset, *known))

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"):
        """As in `trl.SFTTrainer`, of rows that need not be prepared: they are prepared as `evaluate` does it."""
        if not (self.args.skips_preparation or self.has_pictures):
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            test_dataset = self._prepare_dataset(
                test_dataset, self.processing_class, self.args, packing, self._formatting_func, metric_key_prefix
            )
        return without_fillers(super().predict(test_dataset, ignore_keys, metric_key_prefix), test_dataset)

    # --------------------------------------------------------------------------------------------------- preparation

    _brought = staticmethod(brought)

    def limits(self, args: SFTConfig, max_length: int | None) -> Limits:
        """The ids, labels and lengths that rows may have."""
        masks = args.completion_only_loss is not False
        teacher_ids = self.teacher_rows.readable_ids(self.vocab_size)
        return Limits(self.vocab_size, teacher_ids=teacher_ids, max_length=max_length, completion_masks=masks)

    def rooms(self, columns: set[str]) -> list[Room]:
        """The tokens that the models can read of the student's rows; `columns` are those of the rows."""
        return [Room("the student", self._positions), *self.teacher_rows.rooms(columns)]

    def _without_long_rows(self, dataset: Any, name: str, args: Any) -> Any:
        rooms = self.rooms(set(next(iter(dataset), {}))) if args.drop_long_rows else []
        return without_long_rows(dataset, name, rooms, args.dataset_num_proc)

    def prepare_rows(self, dataset: Any, name: str, args: Any) -> Any:
        """Rows of token ids and labels with the teachers' columns; trainers add columns of theirs here."""
        return self.teacher_rows.prepare(dataset, name, args)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = self._tokenized(dataset, processing_class, args, packing, formatting_func, dataset_name)
        return self.prepare_rows(dataset, dataset_name, args)

    def _tokenized(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Rows of token ids and labels, checked, and packed if asked; those without a label are dropped."""
        self.check_rows(dataset, dataset_name, args, formatting_func is not None)  # an evaluation brings its own
        if args.completion_only_loss is None:  # TRL asks the training rows alone whether there are completions
            self.completion_only_loss = True
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
            self._count_first_rows(dataset, processing_class, args, formatting_func, dataset_name)
        return kept if packing else self._without_long_rows(kept, dataset_name, args)

    def _count_first_rows(self, dataset, processing_class, args, formatting_func, dataset_name):
        """Says what the first rows of a stream lose, for nobody counts the others; `ValueError` if none is left."""
        uncut = copy.copy(args)
        uncut.max_length = None
        first = dataset.take(PEEKED_ROWS)
        rows: Any = super()._prepare_dataset(first, processing_class, uncut, False, formatting_func, dataset_name)
        if next(iter(rows)).get("input_ids") is None:
            return  # a collator of its own prepares them
        whole = Dataset.from_list([{name: row[name] for name in COLUMNS if name in row} for row in rows])
        name = f"first {dataset_name}"
        cut = cut_labels(whole, name, args)
        kept = super()._prepare_dataset(whole, processing_class, args, False, None, name)
        kept = with_label(kept, dataset_name, self.limits(args, None), args)
        assert isinstance(kept, Dataset)
        refuse_no_label(kept, dataset_name, args, cut, is_stream=True)
        tell_uncounted(dataset_name, len(whole), args)
        tell_lost_labels(len(whole), len(whole) - len(kept), name, cut, args)

    # ------------------------------------------------------------------------------------------------------- batches

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training: bool = False, **kwargs):
        if not is_training:
            if self.has_pictures and not self._is_prepared(dataset):
                dataset = picture_rows(dataset, "held-out", self.args)
            self.check_readers(dataset)  # of an evaluation's own rows
            processes = self.accelerator.num_processes
            if processes > 1:
                dataset = self._filled_up(dataset, batch_size * processes)
        own, self.data_collator = self.data_collator, self.loader_collator()
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and is_training  # an evaluation is of all rows
        try:
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = own, drops

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """The loader of these rows. If workers persist, transformers gives any rows the one that it keeps."""
        if self._kept_for is not self.eval_dataset:
            drop_loaders(self._eval_dataloaders)
            self._kept_for = self.eval_dataset
        if eval_dataset is None or eval_dataset is self.eval_dataset or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        kept, self._eval_dataloaders = self._eval_dataloaders, {}
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self._eval_dataloaders = kept

    def evaluation_loop(self, dataloader, *args, **kwargs):
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            if not self.is_in_train:
                drop_loaders(self._eval_dataloaders)
            if all(dataloader is not each for each in self._eval_dataloaders.values()):
                end_workers(dataloader)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeededLengthGroups(sampler, seed)
        self._sampler = sampler
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        # transformers would group these rows by length, too. But predictions have the order of their rows, and rows
        # that fill up the last batches are at the end.
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def _filled_up(self, dataset: Any, size: int) -> Any:
        return with_fillers(dataset, size) if self.has_pictures else filled_up(dataset, size, self.filler)

    def filler(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """A row like this one that counts for nothing; None where there is no telling."""
        return {**row, "labels": [-100] * len(row["labels"])} if "labels" in row else None

    def begin(self) -> None:
        super().begin()
        self._has_told_rest = False

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint and not has_length(self.train_dataset) and not self.args.ignore_data_skip:
            saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            epochs, updates = place_in_stream(saved)
            batches = updates * self.args.gradient_accumulation_steps
            self.state.epoch = epochs + updates / max_steps  # of this run, whose `max_steps` may be others
        return epochs, batches

    def _run_epoch(self, *args, **kwargs):
        is_resumed = kwargs["epoch"] == kwargs["epochs_trained"] and kwargs["steps_trained_in_current_epoch"] > 0
        self._is_new_pass, self._is_pass_over = not is_resumed, False
        if hasattr(self._sampler, "set_epoch"):
            # The data loader that skips a resumed run's rows does not reach its sampler if there are several processes.
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        update = self._whole_update(epoch_iterator, num_batches)
        if not update:
            return [], None
        batches, num_items = super().get_batch_samples(iter(update), num_batches, device)
        self.stop_if_away(next(filter(None, map(reason_away, batches)), None))
        self.label_counts.look_at(batches)
        return batches, num_items

    def _whole_update(self, batches: Iterator[Any], number: int) -> list[Any]:
        """The next `number` batches; of a stream none, if fewer are left in the pass.

        transformers steps the optimizer after `gradient_accumulation_steps` batches of a pass whose length is unknown.
        It would never step after fewer: their gradients would be added to the first update of the next pass.

        Raises:
            `ValueError`: a whole pass has too few batches for one update.
        """
        if self._is_pass_over:
            return []  # transformers goes on asking until `max_steps`
        update = list(islice(batches, number))
        if has_length(self.train_dataset):
            return update  # transformers knows how many are left
        left, is_short = len(update), len(update) < number
        if self.accelerator.num_processes > 1 and self.accelerator.dispatch_batches is False:
            # Each process reads shards of its own, and one of them may end first.
            counts = torch.tensor([left, is_short], dtype=torch.float32, device=self.args.device)
            left, is_short = self._sum_over_processes(counts).tolist()
        if not is_short:
            self._is_new_pass = False
            return update
        if left and self._is_new_pass:
            raise ValueError(
                f"a pass over the train dataset has fewer batches than the gradient_accumulation_steps={number} of an "
                f"update ({len(update)} in this process), so no update would ever be whole: lower "
                "gradient_accumulation_steps, repeat the stream (IterableDataset.repeat), or make a Dataset of it "
                "(Dataset.from_generator), whose last update of an epoch may be smaller"
            )
        if left and not self._has_told_rest and self.is_world_process_zero():
            logger.warning(
                "a pass over the train dataset ends within an update: its last batches (%d in this process, of "
                "gradient_accumulation_steps=%d) are not trained on. Without a shuffle these are the same rows in "
                "every pass; of a Dataset (Dataset.from_generator) all rows are trained on", len(update), number,
            )  # fmt: skip
            self._has_told_rest = True
        self._is_pass_over = True
        self.state.epoch = int(self.state.epoch or 0) + 1.0  # in a checkpoint that is saved now, too
        return []

    def _prepare_inputs(self, inputs):
        # DeepSpeed's precision is the student's: teachers' numbers stay as they came.
        own = {name: each.to(self.args.device) for name, each in inputs.items() if name.startswith(PREFIX)}
        return {**super()._prepare_inputs({n: each for n, each in inputs.items() if n not in own}), **own}

    def prediction_step(self, model, inputs, *args, **kwargs):
        self.stop_if_away(reason_away(inputs))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def stop_if_away(self, reason: str | None) -> None:
        """Stops the run in all processes if a teacher of one of them is away; they all come here, between two updates.

        Args:
            reason (`str`, *optional*): why it is away, if it is.

        Raises:
            [`TeacherAway`]: with the reason, after a checkpoint of the last finished update has been saved.
        """
        if not self.teacher_rows.may_be_away:
            return
        away = torch.tensor([reason is not None], dtype=torch.float32, device=self.args.device)
        if self._sum_over_processes(away).item():
            saved = f"; {self.save_finished_update()}" if self.is_in_train else ""
            raise TeacherAway(f"{reason or 'the teacher of another process is away'}{saved}")
