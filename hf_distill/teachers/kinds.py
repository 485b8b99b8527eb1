"""Questions about opened teachers whose answers depend on their kinds.

Trainers ask them here, and do not ask a teacher what it is.
"""

from collections import Counter
from collections.abc import Mapping

from peft import PeftModel
from transformers import PreTrainedModel

from hf_distill.modeling import num_steady_positions, weights_kind
from hf_distill.teachers import Counting, ModelTeacher, Teacher, WritingTeacher
from hf_distill.teachers.across import AcrossTeacher
from hf_distill.teachers.brought import BroughtTeacher
from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.own_view import OwnView, OwnViewTeacher
from hf_distill.teachers.stored import StoredTeacher


def teacher_weights(teacher: Teacher, teachers: Mapping[str, Teacher]) -> dict[str, float]:
    """The weight of each of the `teachers` in `teacher`, which is all of them as one."""
    weights = teacher.weights if isinstance(teacher, EnsembleTeacher) else [1.0]
    return dict(zip(teachers, weights, strict=True))


def may_be_away(teachers: Mapping[str, Teacher]) -> bool:
    """True if one of the teachers may not answer. Models in this process always do."""
    return not all(isinstance(source_of(teacher), ModelTeacher) for teacher in teachers.values())


def steady_positions(teacher: WritingTeacher) -> int | None:
    """The tokens of the longest text that a teacher can read in pieces; a server reads each text whole."""
    return num_steady_positions(teacher.model) if isinstance(teacher, ModelTeacher) else teacher.num_positions


def take_counts(teachers: Mapping[str, Teacher]) -> dict[str, float]:
    """The counts of the teachers since the last call, summed over those that count."""
    counts = Counter[str]()
    for teacher in teachers.values():
        if isinstance(teacher, Counting):
            counts.update(teacher.take_counts())  # pyright: ignore[reportArgumentType]
    return dict(counts)


def own_views(teachers: Mapping[str, Teacher]) -> list[OwnView]:
    """The views of those teachers that read rows with pictures through processors of their own."""
    return [teacher.own for teacher in teachers.values() if isinstance(teacher, OwnViewTeacher)]


def own_models(teachers: Mapping[str, Teacher]) -> dict[str, LocalTeacher]:
    """The teachers that are models with weights of their own in this process."""
    return {name: each for name in teachers if isinstance(each := source_of(teachers[name]), LocalTeacher)}


def describe_teachers(teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """Dtype, or bits, and layout of each teacher's weights, for people."""
    own = own_models(teachers)
    return {
        name: f"{weights_kind(own[name].model)}, {own[name].layout}"
        if name in own
        else getattr(teacher, "layout", teacher.name)
        for name, teacher in teachers.items()
    }


def describe_sources(teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """Stores, servers, quantised weights and other tokenizers of teachers, for model cards."""
    found: dict[str, str] = {}
    if sources := brought_from(teachers):
        found["the teacher's outputs"] = f"from {'; '.join(sources.values())}"
    stores = [each for teacher in teachers.values() if isinstance(each := source_of(teacher), StoredTeacher)]
    if stores:
        found["fingerprint of the store"] = ", ".join(f"`{store.manifest.fingerprint}`" for store in stores)
    if kinds := quantised_weights(teachers):
        is_one = len(teachers) == 1
        found["weights of the teacher"] = ", ".join(k if is_one else f"{name}: {k}" for name, k in kinds.items())
    if methods := alignment_methods(teachers):
        found["other tokenizers"] = ", ".join(f"{name}: {method}" for name, method in methods.items())
    return found


def brought_from(teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """The source of the outputs of each teacher that is no model in this process, for people."""
    sources = {name: source_of(teacher) for name, teacher in teachers.items()}
    return {name: each.source for name, each in sources.items() if isinstance(each, BroughtTeacher)}


def quantised_weights(teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """The bits of each teacher with quantised weights, as text for people.

    It does not matter who quantised them, or whether they were those of a store's teacher.
    """
    found = {}
    for name, teacher in ((name, source_of(teacher)) for name, teacher in teachers.items()):
        if isinstance(teacher, StoredTeacher):
            found[name] = teacher.manifest.teacher.get("quantization")
        elif isinstance(model := getattr(teacher, "model", None), PreTrainedModel | PeftModel):
            kind = weights_kind(model)
            found[name] = None if kind.startswith("torch.") else kind
    return {name: kind for name, kind in found.items() if kind}


def alignment_methods(teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """The method of comparison for each teacher with another tokenizer."""
    return {name: teacher.method for name, teacher in teachers.items() if isinstance(teacher, AcrossTeacher)}


def source_of(teacher: Teacher) -> Teacher:
    """The teacher itself, or the one inside of it that has the weights or the store."""
    return teacher.teacher if isinstance(teacher, AcrossTeacher) else teacher
