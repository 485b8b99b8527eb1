"""A teacher that sees: the student's pictures and tokens, or, with another processor, its own of the same row.

Two processors may cut a picture into different numbers of tokens. What stands for pictures is taken out of both texts;
the rest has to be the same, token by token. So the label-bearing tokens of both are the same, one after the other.
Where the student's row was cut at `max_length`, the teacher's ends at the same token of the text.

Shapes: B rows of a batch, T and Tt tokens of student and teacher, N label-bearing positions.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hf_distill.modeling import PictureSpans, causal_lm, label_positions, num_token_ids, public_name
from hf_distill.named import blindness, load_processor, name_of
from hf_distill.picture_batches import MaskedPictures, spans_of, with_padding
from hf_distill.teachers.columns import PREFIX, AnyDataset
from hf_distill.teachers.local import LocalTeacher
from hf_distill.token_rows import check_batch

logger = logging.getLogger(__name__)

# Settings of processors that say where they came from, not what they do.
_ORIGINS = {"name_or_path", "_name_or_path", "processor_class", "chat_template", "image_processor_type"}


class OwnView:
    """Rows as one model reads them, through a processor of its own, beside the student's batch of them.

    Args:
        model (`PreTrainedModel`): the model.
        processor (`ProcessorMixin`): its own.
        index (`int`): its number among the teachers, in the names of its tensors.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, index: int = 0) -> None:
        self.name, self._num_ids = public_name(model), num_token_ids(causal_lm(model))
        self.processor = with_padding(processor)
        self.spans = spans_of(self.processor, causal_lm(model).config)
        self.prefix = f"{PREFIX}{index}_"
        self._collator: Any = None
        self._student_spans: PictureSpans | None = None
        self._max_length: int | None = None

    def read_with(self, collator: MaskedPictures, student_spans: PictureSpans, max_length: int | None = None) -> None:
        """Called once, before rows are collated.

        Args:
            collator: makes batches with this processor, as the student's are made with its own, but uncut.
            student_spans: tells what stands for pictures in the student's tokens.
            max_length (`int`, *optional*): the tokens that the student's rows are cut at.
        """
        self._collator, self._student_spans, self._max_length = collator, student_spans, max_length

    @property
    def collate(self) -> Any:
        """Its tokens, labels and pixels of a batch of rows, under names that begin with its prefix."""
        return partial(_collate, collator=self._collator, prefix=self.prefix)

    def view(self, inputs: Mapping[str, Any], positions: Tensor) -> tuple[dict[str, Any], Tensor]:
        """As in [`LocalTeacher`], of its own tensors among the student's.

        Raises:
            `ValueError`: the two processors make different texts of a row.
        """
        own = {n.removeprefix(self.prefix): each for n, each in inputs.items() if n.startswith(self.prefix)}
        check_batch(own, "", self._num_ids, self._num_ids, self.processor.tokenizer.pad_token_id)
        assert self._student_spans is not None
        mine, theirs = text_places(inputs, self._student_spans), text_places(own, self.spans)
        if self._max_length is not None:
            own, theirs = end_alike(own, theirs, self.spans, inputs, mine, self._max_length)
        own_positions, own_labels = label_positions(own.pop("labels"))
        texts = [text_lines(inputs["input_ids"], mine), text_lines(own["input_ids"], theirs)]
        labels = inputs["input_ids"].flatten()[positions + 1]
        if not (_equal(*texts) and _equal(labels, own_labels)):
            raise ValueError(self._difference(*texts))
        return own, own_positions

    def _difference(self, student: Tensor, teacher: Tensor) -> str:
        sides = [[row[row >= 0].tolist() for row in side] for side in (student, teacher)]
        remedy = "give both the same chat template and answers (processing_class, teacher_processing_class)"
        for row, (mine, theirs) in enumerate(zip(*sides, strict=True)):
            if mine != theirs:
                place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                             min(len(mine), len(theirs)))  # fmt: skip
                start = self.processor.tokenizer.decode(mine[:16])
                ours, its = (self.processor.tokenizer.decode(side[place : place + 8]) for side in (mine, theirs))
                return (
                    f"the processors of student and teacher ({self.name}) make different texts of a row, without "
                    f"its pictures {len(mine)} and {len(theirs)} tokens: from token {place} on {ours!r} and {its!r}; "
                    f"{remedy}. It is row {row} of its batch, and begins with {start!r}"
                )
        return (
            f"the processors of student and teacher ({self.name}) make the same text of a row, but other tokens of it "
            f"bear labels; {remedy}"
        )


class OwnViewTeacher(LocalTeacher):
    """A vision-language model that reads the rows through a processor of its own.

    Args:
        processor, index: as in [`OwnView`].
        all else: as in [`LocalTeacher`].
    """

    def __init__(self, *args: Any, processor: ProcessorMixin, index: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = OwnView(self.model, processor, index)
        self.prefix, self.view = self.own.prefix, self.own.view

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """The same rows: what is read of them is made in [`collate`]."""
        return dataset

    @property
    def collate(self) -> Any:
        """As in [`OwnView`]."""
        return self.own.collate


def text_places(inputs: Mapping[str, Any], spans: PictureSpans) -> Tensor:
    """True for tokens (B, T) that stand for text."""
    is_text = ~spans(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    return is_text if mask is None else is_text & mask.bool()


def end_alike(
    own: dict[str, Any], own_text: Tensor, own_spans: PictureSpans, inputs: Mapping[str, Any], text: Tensor, length: int
) -> tuple[dict[str, Any], Tensor]:
    """A teacher's batch (B, Tt) whose rows end where those of the student were cut, and its places of text.

    Args:
        own, own_text, own_spans: the teacher's batch, its places of text, and what its pictures are.
        inputs, text: the same of the student.
        length: the number of tokens that the student's rows (B, T) were cut at.
    """
    mask = inputs.get("attention_mask")
    num_tokens = text.new_full(text.shape[:1], text.shape[1], dtype=torch.long) if mask is None else mask.sum(1)
    kept = torch.where(num_tokens >= length, text.sum(1), own_text.sum(1))  # tokens of text
    is_within = own_text.long().cumsum(1) <= kept.unsqueeze(1)
    shape, own_text = own["input_ids"].shape, own_text & is_within
    needed = (own_text | own_spans(own["input_ids"])).any(0)
    end = int(needed.nonzero().max()) + 1 if needed.any() else shape[1]
    own = {**own, "labels": own["labels"].masked_fill(~is_within, -100)}
    cut = {name: each[:, :end] if each.shape[:2] == shape else each for name, each in own.items()}
    return cut, own_text[:, :end]


def text_lines(input_ids: Tensor, is_text: Tensor) -> Tensor:
    """The tokens (B, T) that stand for text, in order at the beginning of each row, and -1 after them."""
    order = (~is_text).long().argsort(dim=1, stable=True)
    lines = torch.where(is_text, input_ids, -1).gather(1, order)
    return lines[:, : int(is_text.sum(1).max())]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _collate(rows: Sequence[dict[str, Any]], collator: MaskedPictures, prefix: str) -> dict[str, Tensor]:
    kept = [{name: cell for name, cell in row.items() if not name.startswith(PREFIX)} for row in rows]
    return {prefix + name: each for name, each in collator(kept).items() if isinstance(each, Tensor)}


# ------------------------------------------------------------------------------------------------- which processor


def own_processor(
    model: Any, given: ProcessorMixin | None, student: ProcessorMixin, args: Any
) -> ProcessorMixin | None:
    """A teacher's processor, if it makes other batches than the student's; None if both make the same.

    A teacher that comes without one reads what the student's makes, with a warning.
    """
    if given is None and (name := name_of(model)):
        try:
            given = load_processor(name, args.teacher_model_init_kwargs, args.trust_remote_code)
        except (ImportError, OSError, TypeError, ValueError) as error:
            logger.warning(
                "the teacher (%s) comes without a processor that works here (%s): it reads what the student's makes. "
                "Pass teacher_processing_class for another one", public_name(model), " ".join(str(error).split())[:200],
            )  # fmt: skip
    if given is None or makes_the_same(given, student):
        return None
    return given


def makes_the_same(one: ProcessorMixin, other: ProcessorMixin) -> bool:
    """True if two processors have the same class, settings, chat template and vocabulary."""
    if one is other:
        return True
    return (
        type(one).__name__ == type(other).__name__
        and _settings(one) == _settings(other)
        and one.chat_template == other.chat_template
        and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    )


def _settings(processor: ProcessorMixin) -> Any:
    settings = json.loads(processor.to_json_string())
    return {name: value for name, value in settings.items() if name not in _ORIGINS}


def refuse_blind(teachers: Mapping[str, Any], args: Any) -> None:
    """Raises `ValueError` for teachers by name that cannot see the pictures of the rows; no weights are read."""
    for name, model in teachers.items():
        if blind := blindness(model, args.teacher_model_init_kwargs, args.trust_remote_code):
            raise ValueError(
                f"the rows have pictures, and the teacher {name} {blind}: take a vision-language teacher, or remove "
                "the column of pictures"
            )
