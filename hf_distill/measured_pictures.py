"""Rows with pictures that are measured without a trainer: batches by the student's processor, and a teacher's own view.

Shapes: B rows of a batch, T tokens of its longest row.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from datasets.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hf_distill.modeling import causal_lm, is_vision_language, num_token_ids, public_name
from hf_distill.picture_batches import PictureCollator, naming_row, picture_collator, spans_of
from hf_distill.picture_rows import AnyDataset, check_picture_rows, columns_of, has_pictures, with_pictures
from hf_distill.rows import used_format
from hf_distill.teachers.own_view import OwnView, makes_the_same
from hf_distill.token_rows import check_batch


def sees_pictures(models: Sequence[PreTrainedModel], dataset: Any) -> bool:
    """True for rows with pictures and models of which one reads them."""
    return has_pictures(dataset) and any(is_vision_language(causal_lm(model)) for model in models)


def batches_with_pictures(
    models: Sequence[PreTrainedModel],
    dataset: AnyDataset,
    processor: Any,
    teacher_processor: ProcessorMixin | None = None,
    *,
    batch_size: int,
    max_length: int | None,
) -> tuple[Iterator[dict[str, Tensor]], OwnView | None]:
    """Batches (B, T) of rows with pictures, and the view of the last model if it is its own.

    Args:
        models: those that read the batches, a teacher last.
        dataset: the rows.
        processor: the student's.
        teacher_processor (`ProcessorMixin`, *optional*): of the teacher.
        batch_size (`int`): B.
        max_length (`int`, *optional*): tokens that are kept of a row; its pictures have to be among them.

    Raises:
        `ValueError`: no processor; a model that reads text alone; rows whose pictures and words do not belong together;
            when it comes, a row that a processor refuses.
    """
    if not isinstance(processor, ProcessorMixin):
        raise ValueError("the rows have pictures: pass the student's processor (AutoProcessor) as the tokenizer")
    if blind := [public_name(model) for model in models if not is_vision_language(causal_lm(model))]:
        raise ValueError(f"the rows have pictures, and {blind[0]} reads text alone: remove the column of pictures")
    dataset = with_pictures(dataset, "held-out")
    check_picture_rows(dataset, "held-out", used_format(set(columns_of(dataset)), "text"), "text")
    spans = spans_of(processor, causal_lm(models[0]).config)
    collator, view = picture_collator(processor, spans, max_length), None
    if teacher_processor is not None and not makes_the_same(teacher_processor, processor):
        view = OwnView(models[-1], teacher_processor)
        view.read_with(picture_collator(view.processor, view.spans), spans, max_length)
    num_ids = min(num_token_ids(causal_lm(model)) for model in models)
    return _batches(dataset, collator, view, num_ids, batch_size), view


def _batches(
    dataset: AnyDataset, collator: PictureCollator, view: OwnView | None, num_ids: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    rows, number = iter(tqdm(dataset, desc="measuring", unit="row", leave=False, delay=1)), 0
    pad_token_id = collator.collator.processor.tokenizer.pad_token_id
    while some := list(islice(rows, batch_size)):
        with naming_row(f"one of the rows {number} to {number + len(some) - 1}"):
            batch = {name: each for name, each in collator(some).items() if isinstance(each, Tensor)}
            check_batch(batch, "", num_ids, num_ids, pad_token_id)
            own = {} if view is None else view.collate(some)
        yield {**batch, **own}
        number += len(some)
