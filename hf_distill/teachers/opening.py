"""The teachers of a run, from what the user gave: names, tokenizers, then models, one after the other.

What names and tokenizers tell is told before any weights are loaded, and teachers are loaded before the student.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.modeling import is_split, public_name, shared_vocabulary, tokenizer_of
from hf_distill.named import load_tokenizer, name_of, student_positions, student_rows, text_config
from hf_distill.teachers import DenseTeacher, Introduced, ModelTeacher, Teacher, require_model, require_writer
from hf_distill.teachers.across import AcrossTeacher
from hf_distill.teachers.brought import BroughtTeacher
from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.loading import load_teacher
from hf_distill.teachers.local import BaseTeacher, LocalTeacher, refuse_shared_memory
from hf_distill.teachers.own_view import OwnViewTeacher, own_processor, refuse_blind
from hf_distill.teachers.remote import RemoteTeacher, is_address
from hf_distill.teachers.stored import StoredHiddenTeacher, StoredTeacher, is_stored, open_store

logger = logging.getLogger(__name__)

BASE = "base"  # the name of a teacher that is the student's own base model


class NamedTeachers(NamedTuple):
    """The teachers as the user gave them, by name. Nothing is loaded yet but tokenizers."""

    models: dict[str, Any]  # hub id, path, model, "base", or any `Teacher`
    tokenizers: dict[str, PreTrainedTokenizerBase | None]  # None: none came with it, or it needs none
    devices: dict[str, str | None]
    processors: dict[str, ProcessorMixin]  # those that the user gave, of pictures and texts


class OpenTeachers(NamedTuple):
    """The teachers of a run, ready to be asked but for the student's own base."""

    by_name: dict[str, Teacher]
    teacher: Teacher  # all of them as one
    vocab_size: int  # token ids below this mean the same to student and teachers
    sharded: frozenset[str]  # names of those to split over all processes


def is_base(model: Any) -> bool:
    return isinstance(model, str) and model == BASE


def name_teachers(teachers: Any, tokenizers: Any, args: Any) -> NamedTeachers:
    """The teachers by name; several may have the same, and are numbered then.

    Args:
        teachers: one, a list or a dict of hub ids, paths, stores, addresses, models or [`Teacher`] objects. Several
            addresses in a list are those of one teacher.
        tokenizers: one, a list or a dict of their tokenizers, or None.
        args ([`KDConfig`]): settings.

    Raises:
        `ValueError`: there is no teacher, or a setting has another number of entries than there are teachers.
    """
    given = list(teachers.values()) if isinstance(teachers, Mapping) else teachers
    given = [given] if isinstance(given, str | Teacher) or not isinstance(given, Sequence) else given
    given = [
        open_store(str(each), index=i, num_proc=args.dataset_num_proc) if is_stored(each) else each
        for i, each in enumerate(given)
    ]
    if isinstance(teachers, Mapping):
        given = [_with_servers([each], args, index=i)[0] for i, each in enumerate(given)]
    else:
        given = _with_servers(given, args)
    if not given or any(teacher is None for teacher in given):
        raise ValueError("teacher_model is missing: pass a hub id, a path or a model (HardLabelTrainer trains without)")
    if strange := [type(teacher).__name__ for teacher in given if not isinstance(teacher, str | nn.Module | Teacher)]:
        raise ValueError(
            f"teacher_model has to be a hub id, a path, a model, an object with the methods of hf_distill.teachers."
            f"Teacher, or a list or dict of them, not {strange[0]}"
        )
    if isinstance(teachers, Mapping):
        named = dict(zip(teachers, given, strict=True))
    else:
        named = {}
        for teacher in given:
            name = teacher.name if isinstance(teacher, Teacher) else public_name(teacher)
            named[name if name not in named else f"{name} ({len(named) + 1})"] = teacher
    _check_settings(named, args)
    devices = [device.strip() or None for device in (args.teacher_device or "").split(",")]
    own = _own_tokenizers(named, tokenizers, args)
    return NamedTeachers(
        named,
        {name: tokenizer_of(each) for name, each in own.items()},
        dict(zip(named, devices * len(named), strict=False)),
        {name: each for name, each in own.items() if isinstance(each, ProcessorMixin)},
    )


def refuse_tokens_alone(teachers: Any) -> None:
    """Raises `ValueError` for stores and servers among the teachers of rows with pictures; none is opened for it."""
    given = list(teachers.values()) if isinstance(teachers, Mapping) else teachers
    for each in given if isinstance(given, list | tuple) else [given]:
        if is_address(each) or is_stored(each) or isinstance(each, BroughtTeacher):
            raise ValueError(
                f"the rows have pictures, and {each if isinstance(each, str) else each.name} is asked by their tokens "
                "alone: take a vision-language model in this process as the teacher"
            )


def refuse_without_sight(named: NamedTeachers, args: Any) -> None:
    """Raises `ValueError` for teachers that could not say anything about rows with pictures."""
    if args.teacher_combination == "route" and len(named.models) > 1:
        raise ValueError(
            "teacher_combination='route' cannot divide the pixels of a batch among teachers: take 'mixture' or 'sum'"
        )
    models = {name: each for name, each in named.models.items() if not isinstance(each, Teacher) and not is_base(each)}
    refuse_blind(models, args)
    for name, each in named.tokenizers.items():
        if name in models and each is not None and name not in named.processors and not isinstance(models[name], str):
            raise ValueError(
                f"the rows have pictures, and the teacher_processing_class of {name} is a tokenizer: pass its "
                "processor (AutoProcessor), or none to take the student's"
            )


def find_tokenizers(
    named: NamedTeachers, student_tokenizer: PreTrainedTokenizerBase, args: Any, *, crosses: bool
) -> tuple[dict[str, int | None], dict[str, PreTrainedTokenizerBase]]:
    """The number of token ids that mean the same to the student and each teacher, and the teachers' tokenizers.

    For a teacher with another tokenizer the number is None, and texts have to be aligned. `crosses` is true if this
    trainer can do so.

    Raises:
        `ValueError`: a teacher has another vocabulary, and texts cannot be aligned here.
    """
    shared: dict[str, int | None] = {}
    found: dict[str, PreTrainedTokenizerBase] = {}
    for name, model in named.models.items():
        own = named.tokenizers[name]
        if isinstance(model, StoredTeacher):
            model.refuse_settings(args, student_tokenizer)
            own = model.tokenizer
        if own is None and not is_base(model) and not isinstance(model, Teacher):
            own = _teacher_tokenizer(model, args)
        found[name] = own or student_tokenizer
        try:
            shared[name] = shared_vocabulary(student_tokenizer, found[name])
        except ValueError:
            is_object = isinstance(model, Teacher) and not isinstance(model, StoredHiddenTeacher)
            if args.cross_tokenizer == "error" or args.skips_preparation or is_object or not crosses:
                raise
            shared[name] = None
    _refuse_across([name for name in shared if shared[name] is None], named, args)
    return shared, found


def open_teachers(
    named: NamedTeachers,
    shared: Mapping[str, int | None],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    student: str | PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    args: Any,
    *,
    has_adapters: bool,
    processor: ProcessorMixin | None = None,
) -> OpenTeachers:
    """Loads the teachers, one after the other.

    Args:
        named, shared, tokenizers: from [`name_teachers`] and [`find_tokenizers`].
        student (`str` or `PreTrainedModel`), student_tokenizer (`PreTrainedTokenizerBase`): the student's.
        args ([`KDConfig`]): settings.
        has_adapters (`bool`): whether the student will be trained in adapters alone, which no teacher shares.
        processor (`ProcessorMixin`, *optional*): the student's, of rows with pictures.

    Raises:
        `ValueError`: what `load_teacher` refuses; a teacher that shares its memory with the student.
    """
    rows, num_proc = student_rows(student, args), args.dataset_num_proc
    vocab_size = min([rows, *(size for size in shared.values() if size is not None)])
    by_name: dict[str, Teacher] = {}
    for name, given in named.models.items():
        if is_base(given):
            by_name[name] = BaseTeacher(
                None, tokenizers[name], num_proc, positions=student_positions(student, args),
                drop_long_rows=args.drop_long_rows,
            )  # fmt: skip
            continue
        teacher: Any = given
        if not isinstance(given, Teacher):
            own = processor and own_processor(given, named.processors.get(name), processor, args)
            kind = partial(OwnViewTeacher, processor=own, index=len(by_name)) if own else LocalTeacher
            teacher = _loaded(
                given, named.devices[name], tokenizers[name], student, args, has_adapters=has_adapters, kind=kind
            )
            if len(named.models) > 1:
                logger.info("teacher %s: %.1f MiB", name, teacher.model.get_memory_footprint() / 2**20)
        if shared[name] is None:
            teacher = AcrossTeacher(
                teacher, student_tokenizer, index=len(by_name), method=args.cross_tokenizer, student_rows=rows
            )
            if teacher.method == "uld" and (args.divergence != "forward_kl" or args.divergence_params):
                logger.warning(
                    "%s: uld compares sorted probabilities by their distance, divergence=%r has no part in it", name,
                    args.divergence,
                )  # fmt: skip
        elif isinstance(teacher, DenseTeacher):
            vocab_size = min(vocab_size, teacher.head.weight.shape[0])
        by_name[name] = teacher
    for teacher in by_name.values():
        if isinstance(teacher, Introduced):
            teacher.introduce(student_tokenizer, vocab_size)
    whole: Any = next(iter(by_name.values()))
    if len(by_name) > 1:
        combination = args.teacher_combination
        whole = EnsembleTeacher(by_name, args.teacher_weights, combination=combination, num_proc=num_proc)
    sharded = frozenset(name for name, device in named.devices.items() if device == "sharded")
    return OpenTeachers(by_name, whole, vocab_size, sharded)


def require_models(teachers: Mapping[str, Any], what_for: str) -> None:
    """Raises `ValueError` for a teacher, not yet loaded, that will be no model in this process."""
    for teacher in teachers.values():
        if isinstance(teacher, Teacher):
            require_model(teacher, what_for)


def require_writers(teachers: Mapping[str, Any], what_for: str) -> None:
    """Raises `ValueError` for a teacher, not yet loaded, that will not be able to check drafts."""
    for teacher in teachers.values():
        if isinstance(teacher, Teacher):
            require_writer(teacher, what_for)


def refuse_as_writer(teachers: Any, args: Any) -> None:
    """Raises `ValueError` for what the user gave as teachers, if it could not take part in rollouts."""
    if is_base(teachers) or isinstance(teachers, list | tuple | Mapping):
        raise ValueError("text is written with one teacher, which is a model of its own: pass its name or path")
    if args.teacher_device in ("offload", "sharded") or (isinstance(teachers, PreTrainedModel) and is_split(teachers)):
        raise ValueError(
            "the teacher has to be whole on its devices: texts are written in hundreds of small forwards, and each "
            "would move all of its weights. Remove teacher_device='offload' or 'sharded'; under ZeRO-3 pass the "
            "teacher by name, or load it before the arguments"
        )


def bind_teachers(opened: OpenTeachers, student: PreTrainedModel, accelerator: Accelerator) -> None:
    """Tells our teachers that the student is loaded."""
    for name, teacher in opened.by_name.items():
        if isinstance(teacher, LocalTeacher | AcrossTeacher | BaseTeacher | BroughtTeacher):
            teacher.bind(student, accelerator, sharded=name in opened.sharded)


def teacher_config(model: Any, args: Any) -> PreTrainedConfig:
    """A teacher's configuration, loaded or not."""
    model = model.model if isinstance(model, ModelTeacher) else model
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
    return text_config(model, **kwargs)


# ---------------------------------------------------------------------------------------------------------- details


def _with_servers(given: Sequence[Any], args: Any, index: int = 0) -> list[Any]:
    """The teachers, of which several addresses are one: copies of a server, which share the rows."""
    addresses = [each for each in given if is_address(each)]
    if not addresses:
        return list(given)
    first = given.index(addresses[0])
    remote = RemoteTeacher(addresses, args, index=index + first)
    return [remote if i == first else each for i, each in enumerate(given) if i == first or not is_address(each)]


def _loaded(
    model: Any, device: str | None, tokenizer: PreTrainedTokenizerBase, student: Any, args: Any, *, has_adapters: bool,
    kind: Callable[..., LocalTeacher],
) -> LocalTeacher:  # fmt: skip
    model = load_teacher(
        model,
        device=device,
        student_device=args.device,
        quantization=args.teacher_quantization,
        trust_remote_code=args.trust_remote_code,
        init_kwargs=args.teacher_model_init_kwargs,
    )
    if not isinstance(student, str) and not has_adapters:
        refuse_shared_memory(student, model)  # Before the teacher is frozen, and what it shares with it.
    return kind(model, args.device, tokenizer, args.dataset_num_proc, drop_long_rows=args.drop_long_rows)


def _check_settings(named: Mapping[str, Any], args: Any) -> None:
    if args.teacher_weights is not None and len(args.teacher_weights) != len(named):
        raise ValueError(f"there are {len(named)} teachers ({', '.join(named)}) and {args.teacher_weights=}")
    if args.teacher_device is not None and args.teacher_device.count(",") not in (0, len(named) - 1):
        raise ValueError(
            f"there are {len(named)} teachers and {args.teacher_device=}: name one device, or one for each"
        )
    if len(named) == 1 and (args.teacher_combination != "mixture" or args.teacher_weights):
        raise ValueError("teacher_combination and teacher_weights need several teachers: teacher_model=[...]")
    if args.teacher_combination == "route" and args.teacher_weights:
        raise ValueError("teacher_weights are not used with teacher_combination='route': each row has one teacher")
    if len(named) == 1 or args.teacher_combination == "sum":
        return
    mixes, is_linear = args.teacher_combination == "mixture", args.divergence == "forward_kl"

    def can_be_mixed(teacher: Teacher) -> bool:
        is_sample = isinstance(teacher, StoredTeacher) and teacher.manifest.method == "sampled"
        return mixes and (isinstance(teacher, StoredHiddenTeacher) or (is_sample and is_linear))

    if other := [name for name, each in named.items() if isinstance(each, Teacher) and not can_be_mixed(each)]:
        raise ValueError(
            f"{other[0]} is no model, and teacher_combination={args.teacher_combination!r} with divergence="
            f"{args.divergence!r} needs models with the student's tokenizer: take 'sum'"
        )


def _own_tokenizers(named: Mapping[str, Any], tokenizers: Any, args: Any) -> dict[str, PreTrainedTokenizerBase | None]:
    """The tokenizers that came with the teachers."""
    if isinstance(tokenizers, Mapping):
        if unknown := set(tokenizers) - set(named):
            raise ValueError(f"teacher_processing_class has {sorted(unknown)}; the teachers are {', '.join(named)}")
        return {name: tokenizers.get(name) for name in named}
    if isinstance(tokenizers, list | tuple):
        listed = list(tokenizers)
    elif len(named) == 1 or tokenizers is None:
        listed = [tokenizers] * len(named)
    else:  # one for those that bring none
        listed = [_saved_tokenizer(teacher, args) or tokenizers for teacher in named.values()]
    if len(listed) != len(named):
        raise ValueError(f"there are {len(named)} teachers and {len(listed)} of teacher_processing_class")
    return dict(zip(named, listed, strict=True))


def _teacher_tokenizer(model: str | PreTrainedModel, args: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with the teacher, or None, with a warning, where there is none."""
    if tokenizer := _saved_tokenizer(model, args):
        return tokenizer
    logger.warning(
        "the teacher (%s) comes without a tokenizer: its vocabulary is taken to be the student's. Pass "
        "teacher_processing_class to have that checked",
        public_name(model),
    )
    return None


def _saved_tokenizer(model: Any, args: Any) -> PreTrainedTokenizerBase | None:
    name = name_of(model)
    if not name or name == BASE:
        return None
    try:
        return load_tokenizer(name, args.teacher_model_init_kwargs, args.trust_remote_code)
    except (OSError, ValueError):
        return None


def _refuse_across(across: Sequence[str], named: NamedTeachers, args: Any) -> None:
    """Raises `ValueError` for what is not possible with teachers `across` that have another tokenizer."""
    if not across:
        return
    name = across[0]
    if len(named.models) > 1 and args.teacher_combination != "sum":
        raise ValueError(
            f"{name} has another tokenizer than the student, and teacher_combination={args.teacher_combination!r} "
            "needs teachers with the student's: take 'sum', or other teachers"
        )
    if args.joins_rows:
        raise ValueError(
            f"packing and padding_free join rows, but {name} reads them in its own tokens: set both to False"
        )
    if args.has_hidden:
        raise ValueError(f"hidden_weight compares token by token, but {name} has another tokenizer: set it to 0")
