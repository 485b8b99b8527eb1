"""From a trainer to a store: the documents of its rows, its teacher, and what the manifest says of both."""

from typing import Any

from hf_distill.store.documents import Documents, joined
from hf_distill.teachers.asked import teacher_to_ask
from hf_distill.teachers.columns import own_columns
from hf_distill.teachers.stored import fingerprint, row_settings
from hf_distill.teachers.writing import Method, StoreWriter
from hf_distill.trainers.checks import named_datasets


def store_writer(trainer: Any, method: Method, batch_size: int | None = None) -> StoreWriter:
    """Writes what the teacher of a trainer says about the rows of all its data sets.

    Args:
        trainer ([`KDTrainer`]): with one teacher that is a model, here or behind an address.
        method ([`Method`]): what is kept.
        batch_size (`int`, *optional*): documents of a forward; `per_device_eval_batch_size` by default.

    Raises:
        `ValueError`: several teachers, one that is no model, or one with another tokenizer of which no hidden states
            are kept; rows that are no texts yet.
    """
    if trainer.has_pictures:
        raise ValueError("the rows have pictures, and a store finds texts by their tokens alone: none can be written")
    args, tokenizer = trainer.args, trainer.tokenizer
    asked = teacher_to_ask(trainer.teacher)
    asked.refuse_method(method)
    if args.packing and args.packing_strategy == "wrapped":
        raise ValueError("packing_strategy='wrapped' cuts texts wherever a row ends: take 'bfd'")
    parts = []
    for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset).items():
        first = next(iter(dataset), {})
        if "input_ids" not in first:
            raise ValueError(f"the {name} dataset has no tokens before training, so a teacher cannot be asked about it")
        parts.append(Documents.of_dataset(dataset, *(asked.columns or own_columns(first))))
    own = tokenizer if asked.columns is None else trainer.teacher.tokenizer
    about = {
        "teacher": asked.about(trainer.accelerator.mixed_precision),
        "tokenizer": {
            name: fingerprint(sorted(each.get_vocab().items())) for name, each in (("own", own), ("student", tokenizer))
        },
        "rows": row_settings(args, tokenizer),
    }
    return StoreWriter(
        asked.teacher,
        joined(parts, [0] * len(parts)),
        method,
        trainer.accelerator,
        about=about,
        tokenizer=own,
        vocab_size=trainer.vocab_size if asked.columns is None else len(asked.teacher.head.weight),
        temperature=args.temperature,
        batch_size=args.per_device_eval_batch_size if batch_size is None else batch_size,
        refuse=asked.refuse_other,
    )
