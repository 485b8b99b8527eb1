"""Vision-language students in a trainer: refused settings, the frozen tower, rows that are tried before training."""

import copy
import inspect
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from datasets import IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hf_distill.modeling import (
    PictureSpans,
    check_length,
    language_part,
    vision_tower,
)
from hf_distill.named import blindness, student_without_weights
from hf_distill.picture_batches import MaskedPictures, PictureCollator, naming_row
from hf_distill.picture_rows import (
    AnyDataset,
    check_picture_rows,
    columns_of,
    has_pictures,
    has_transform,
    picture_column,
    pictures_of,
    with_pictures,
)
from hf_distill.rows import used_format
from hf_distill.trainers.checks import splits_weights
from hf_distill.trainers.data import tell_columns

logger = logging.getLogger(__name__)

# Columns that are read of rows of text alone.
TEXT_ALONE = {"teacher_prompt", "teacher_input_ids", "teacher_labels", "tools", "chat_template_kwargs"}
TRIED_ROWS = 256  # rows of a data set that go through the processors before the training


# ---------------------------------------------------------------------------------------- before anything is loaded


def picture_rows(dataset: AnyDataset, name: str, args: Any) -> AnyDataset:
    """A data set whose pictures, if it has some, are `datasets.Image`, and belong to its words."""
    if not has_pictures(dataset):
        return dataset
    columns = set(columns_of(dataset))
    used = used_format(columns, args.dataset_text_field)
    if "input_ids" in columns:
        raise ValueError(
            f"the {name} dataset has pictures and 'input_ids', but how many tokens a picture is, a processor decides: "
            "give the rows as messages, or as prompt and completion, or make pixels in a data_collator of your own"
        )
    if taken := sorted(columns & TEXT_ALONE):
        raise ValueError(f"the {name} dataset has pictures, and {taken[0]!r}, which is read of rows of text alone")
    if args.remove_unused_columns and has_transform(dataset) and set(dataset.column_names or ()) - columns:
        raise ValueError(
            f"the {name} dataset has a transform that makes pictures of other columns, which would be removed before: "
            "set remove_unused_columns=False"
        )
    dataset = with_pictures(dataset, name)
    check_picture_rows(dataset, name, used, args.dataset_text_field)
    tell_columns(dataset, name, args)
    return refuse_empty(dataset, name) if args.world_size > 1 and splits_weights(args) else dataset


def refuse_empty(dataset: AnyDataset, name: str) -> AnyDataset:
    """The same rows; `ValueError` for one without a picture, of a stream when it comes."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(with_a_picture, with_indices=True, fn_kwargs={"name": name}, features=dataset.features)
    if has_transform(dataset):
        rows: Any = iter(dataset)
    else:
        column = str(picture_column(dataset.column_names))
        tables: Any = dataset.with_format("arrow").select_columns(column).iter(batch_size=100)
        rows = chain.from_iterable(table.to_pylist() for table in tables)
    for index, row in enumerate(rows):
        with_a_picture(row, index, name)
    return dataset


def refuse_for_pictures(args: Any, columns: set[str], has_formatting: bool) -> None:
    """Raises `ValueError` for settings that do not go together with pictures in rows of these `columns`."""
    why = "the rows have pictures, "
    if args.joins_rows:
        raise ValueError(f"{why}and packing, eval_packing and padding_free join rows of text alone: set them to False")
    if args.truncation_mode == "keep_end":
        raise ValueError(f"{why}which stand at the beginning: truncation_mode='keep_end' would cut them off")
    if args.drop_long_rows:
        raise ValueError(f"{why}whose tokens are counted in batches alone: drop_long_rows=True cannot see them before")
    by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if by_length and (args.remove_unused_columns or args.length_column_name not in columns):
        raise ValueError(
            f"{why}whose tokens are counted in batches alone: train_sampling_strategy={args.train_sampling_strategy!r} "
            f"needs a column {args.length_column_name!r}, and remove_unused_columns=False; or leave it out"
        )
    if has_formatting:
        raise ValueError(f"{why}and formatting_func makes text alone of them: give them the columns instead")
    used = used_format(columns, args.dataset_text_field)
    is_completion = used == ("prompt", "completion")
    if args.pad_to_multiple_of is not None and is_completion:
        raise ValueError(f"{why}and TRL pads none with a completion to pad_to_multiple_of: leave it out")
    if args.assistant_only_loss and is_completion:
        raise ValueError(
            f"{why}a prompt and a completion: only the completion is trained anyway; leave assistant_only_loss out"
        )
    if args.completion_only_loss and not is_completion:
        raise ValueError(
            f"{why}and no prompt and completion, of which completion_only_loss=True speaks: take assistant_only_loss"
        )


def refuse_student(model: Any, processing_class: Any, args: Any) -> None:
    """Raises `ValueError` for a student that does not see, or a tokenizer where a processor is needed."""
    if blind := blindness(model, args.model_init_kwargs, args.trust_remote_code):
        raise ValueError(
            f"the rows have pictures, and the student {blind}: take a vision-language student, or remove the column of "
            "pictures"
        )
    if processing_class is not None and not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"the rows have pictures, and processing_class is a {type(processing_class).__name__}: pass the student's "
            "processor (AutoProcessor.from_pretrained), which has the tokenizer in it"
        )


def kept_to_language(peft_config: Any, model: str | PreTrainedModel, args: Any = None) -> Any:
    """The same adapters, but none in the part of a model that sees; what the user leaves out stays out, too.

    "all-linear" is all of the language part; what is named is adapted between the two parts, too.

    Args:
        args: the settings that a model given by name is loaded with.
    """
    if not isinstance(peft_config, PeftConfig) or not hasattr(peft_config, "exclude_modules"):
        return peft_config
    student: Any = student_without_weights(model, args) if isinstance(model, str) else model
    if student is None or (tower := vision_tower(student)) is None:
        return peft_config
    outside = rf"{re.escape(tower[0])}\..*"
    if getattr(peft_config, "target_modules", None) == "all-linear":
        name, _ = language_part(student)
        outside = rf"(?!{re.escape(name)}\.).*"
        logger.info("adapters of 'all-linear' go to %s alone: name more modules, or freeze_vision_tower=False", name)
    own: Any = getattr(peft_config, "exclude_modules")  # noqa: B009 - not all adapters have it
    if isinstance(own, list | tuple | set):
        own = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(own)))})"
    kept: Any = copy.copy(peft_config)
    kept.exclude_modules = f"{outside}|{own}" if own else outside
    return kept


def with_a_picture(row: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    """The row; `ValueError` if it has no picture, where the tower is spread over processes."""
    if not pictures_of(row):
        raise ValueError(
            f"row {index} of the {name} dataset has no picture: the tower is spread over processes, and one without a "
            "picture in its batch would leave the others waiting for it. Drop such rows, or train with DDP or ZeRO-2"
        )
    return row


# --------------------------------------------------------------------------------------------- the loaded student


def keep_batches_whole(accelerator: Accelerator) -> None:
    """Lets each process read the rows of a stream itself: pixels are not always divided by rows.

    Raises:
        `ValueError`: the settings want one process to hand out batches.
    """
    if accelerator.dataloader_config.dispatch_batches:
        raise ValueError("dispatch_batches=True cuts the pixels of a batch: remove it from accelerator_config")
    accelerator.dataloader_config.dispatch_batches = False


def refuse_pixels(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a batch with pictures if a model has no vision tower: it would learn their tokens."""
    if found := [name for name in ("pixel_values", "image_patches") if name in inputs]:
        raise ValueError(
            f"a batch has {found[0]}, and {type(model).__name__} has no vision tower, so the tokens of its pictures "
            "would be learned as text: take a vision-language model with one"
        )


def refuse_flat_places(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for pictures without the kinds of tokens that a model (Qwen-VL) gives places in rows by."""
    missing = "image_grid_thw" in inputs and "mm_token_type_ids" not in inputs
    if missing and "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            "a batch has image_grid_thw and no mm_token_type_ids, without which the model would read its pictures as "
            "one line of text: let the data_collator return what the processor does (1 for tokens of pictures, else 0)"
        )


def freeze_tower(student: PreTrainedModel) -> str | None:
    """Freezes the part of a student that sees; returns what there is to tell, None if nothing has changed."""
    if (found := vision_tower(student)) is None:
        return None
    name, tower = found
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    if not trained:
        return None
    tower.requires_grad_(False)
    size = sum(parameter.numel() for parameter in trained)
    return f"{name} ({size:,} parameters) is frozen; freeze_vision_tower=False trains it"


def student_collator(collator: Any, spans: PictureSpans, args: Any, is_own: bool) -> MaskedPictures:
    """TRL's collator of pictures, whose batches are cut and masked here, or another one, whose labels are masked."""
    if is_own:
        return MaskedPictures(collator, spans)
    # TRL asks the training rows whether there are completions; held-out rows may be of another format.
    collator = replace(collator, max_length=None, completion_only_loss=args.completion_only_loss is not False)
    return PictureCollator(collator, spans, args.max_length)


def own_collator(student: Any, processor: Any, spans: PictureSpans) -> PictureCollator:
    """The collator of a teacher with a processor of its own, in all else like the student's.

    Raises:
        `ValueError`: the student's is one of the user's own, which makes batches for one processor.
    """
    if not isinstance(student, PictureCollator):
        raise ValueError(
            "data_collator makes batches for one processor, and the teacher has another: leave it out, or give the "
            "teacher none (teacher_processing_class)"
        )
    template = None
    if student.collator.assistant_only_loss and not has_generation_markers(processor.chat_template):
        template = get_training_chat_template(processor)
    # Uncut: what is left of the student's text decides where the teacher's ends, too.
    return PictureCollator(replace(student.collator, processor=processor, chat_template=template), spans)


# ------------------------------------------------------------------------------------------------------- tried rows


def try_rows(trainer: Any, dataset: AnyDataset, name: str) -> None:
    """Makes batches of the first rows with pictures, and lets the models of the run read some.

    Raises:
        `ValueError`: a row that a processor refuses, or that two processors make different texts of; rows without a
            label; a processor of another model.
    """
    collate = trainer.batch_collator()
    counts: dict[str, int] = dict.fromkeys(("rows", "tokens", "pictures", "labels", "unlabelled"), 0)
    longest: dict[str, int] = Counter()  # by the prefix of what a model reads
    for index, row in enumerate(trainer.first_rows(dataset, TRIED_ROWS)):
        called = f"row {index} of the {name} dataset"
        with naming_row(called):
            batch = collate([row])
            inputs, positions, labels = trainer.take_labels(_on(batch, trainer.student.device))
            trainer.teacher_rows.try_views(inputs, positions)
        ids = inputs["input_ids"]
        counts["rows"] += 1
        counts["tokens"] += ids.numel()
        counts["pictures"] += int(trainer.data_collator.pictures(inputs).sum())
        counts["labels"] += labels.numel()
        counts["unlabelled"] += labels.numel() == 0
        for key, each in inputs.items():
            if key.endswith("input_ids"):
                prefix = key.removesuffix("input_ids")
                longest[prefix] = max(longest[prefix], each.shape[1])
    _tell(counts, name, trainer.args)
    rows = trainer.first_rows(dataset, max(2, min(TRIED_ROWS, trainer.args.per_device_train_batch_size)))
    with naming_row(f"the first {len(rows)} rows of the {name} dataset"):
        batch = _on(collate(rows), trainer.student.device)
        inputs, positions, _ = trainer.take_labels(batch)
    for reader in trainer.readers():
        text = f"the longest of the first {counts['rows']} rows of the {name} dataset"
        check_length(
            reader.model, reader.name, longest[reader.prefix], text, f"set max_length, or shorten the {name} rows"
        )
    trainer.try_reading(inputs)
    trainer.teacher_rows.try_reading(inputs, positions)


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: each.to(device) if isinstance(each, Tensor) else each for name, each in batch.items()}


def _tell(counts: Mapping[str, int], name: str, args: Any) -> None:
    if not counts["labels"]:
        raise ValueError(
            f"none of the first {counts['rows']} rows of the {name} dataset has a label left to train on; check "
            f"max_length ({args.max_length}), completion_only_loss, assistant_only_loss and the chat template"
        )
    logger.info(
        "%s: pictures take %d of %d tokens in the first %d rows; none of these bears a label",
        name, counts["pictures"], counts["tokens"], counts["rows"],
    )  # fmt: skip
    if counts["unlabelled"]:
        logger.warning(
            "%d of the first %d %s rows have no label, and teach nothing: see max_length (%s) and their answers",
            counts["unlabelled"], counts["rows"], name, args.max_length,
        )  # fmt: skip
