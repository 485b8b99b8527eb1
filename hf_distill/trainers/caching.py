"""From a trainer to a store: the documents of its rows, its teacher, and what the manifest says of both."""

from typing import Any

from hf_distill.modeling import causal_lm, weights_fingerprint, weights_kind
from hf_distill.store.documents import Documents, joined
from hf_distill.teachers import ModelTeacher
from hf_distill.teachers.columns import own_columns
from hf_distill.teachers.opening import teacher_to_ask
from hf_distill.teachers.remote import RemoteTeacher
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
    teacher, columns = teacher_to_ask(trainer.teacher)
    if isinstance(teacher, RemoteTeacher) and (method.store != "topk" or method.entries > teacher.num_entries):
        raise ValueError(
            f"{teacher.name} is behind an address and tells the {teacher.num_entries} most likely tokens: take "
            f"store='topk' with at most {teacher.num_entries} entries"
        )
    if columns is not None and method.store != "hidden":
        raise ValueError(
            f"{teacher.name} has another tokenizer than the student, and store={method.store!r} has nothing that can "
            "be aligned: take store='hidden'"
        )
    if args.packing and args.packing_strategy == "wrapped":
        raise ValueError("packing_strategy='wrapped' cuts texts wherever a row ends: take 'bfd'")
    parts = []
    for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset).items():
        first = next(iter(dataset), {})
        if "input_ids" not in first:
            raise ValueError(f"the {name} dataset has no tokens before training, so a teacher cannot be asked about it")
        parts.append(Documents.of_dataset(dataset, *(columns or own_columns(first))))
    own = tokenizer if columns is None else trainer.teacher.tokenizer
    vocabularies = {
        name: fingerprint(sorted(each.get_vocab().items())) for name, each in (("own", own), ("student", tokenizer))
    }
    return StoreWriter(
        teacher,
        joined(parts, [0] * len(parts)),
        method,
        trainer.accelerator,
        about={"teacher": _about(trainer, teacher), "tokenizer": vocabularies, "rows": row_settings(args, tokenizer)},
        tokenizer=own,
        vocab_size=trainer.vocab_size if columns is None else len(teacher.head.weight),  # pyright: ignore
        temperature=args.temperature,
        batch_size=args.per_device_eval_batch_size if batch_size is None else batch_size,
        refuse=lambda manifest: teacher.refuse_other(manifest.teacher) if isinstance(teacher, RemoteTeacher) else None,
    )


def _about(trainer: Any, teacher: ModelTeacher | RemoteTeacher) -> dict[str, Any]:
    """The manifest's facts about a teacher. In the place of a server's weights stands its answer about one text."""
    if isinstance(teacher, RemoteTeacher):
        return {
            "name": teacher.name, "revision": None, "weights": None, "dtype": "of the server", "quantization": None,
            "server": teacher.version, "watched": teacher.watched(),
        }  # fmt: skip
    model = causal_lm(teacher.model)
    kind = weights_kind(model)
    return {
        "name": trainer.teacher.name,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": f"{kind[0]}bit" if kind[0].isdigit() else None,
        # A teacher is asked outside of the student's mixed precision, unless the engine has split it.
        "precision": trainer.accelerator.mixed_precision if getattr(teacher, "sharded", False) else "no",
    }
