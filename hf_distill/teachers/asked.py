"""The teacher that is asked when a store is written: a model in this process, or one on a server."""

from typing import Any, NamedTuple

from hf_distill.modeling import causal_lm, is_split, weights_fingerprint, weights_kind
from hf_distill.store.manifest import Manifest
from hf_distill.teachers import ModelTeacher, Teacher
from hf_distill.teachers.across import AcrossTeacher
from hf_distill.teachers.kinds import source_of
from hf_distill.teachers.local import BaseTeacher
from hf_distill.teachers.remote import RemoteTeacher
from hf_distill.teachers.writing import Method


class Asked(NamedTuple):
    """A teacher of which a store can be written."""

    name: str
    teacher: Any  # is called with the documents
    columns: tuple[str, str] | None  # those that it reads, if it has another tokenizer than the student
    server: RemoteTeacher | None  # the same teacher, if it is one on a server

    def refuse_method(self, method: Method) -> None:
        """Raises `ValueError` for what the teacher does not tell, or what could not be aligned."""
        if self.server is not None and (method.store != "topk" or method.entries > self.server.num_entries):
            raise ValueError(
                f"{self.name} is behind an address and tells the {self.server.num_entries} most likely tokens: take "
                f"store='topk' with at most {self.server.num_entries} entries"
            )
        if self.columns is not None and method.store != "hidden":
            raise ValueError(
                f"{self.name} has another tokenizer than the student, and store={method.store!r} has nothing that can "
                "be aligned: take store='hidden'"
            )

    def refuse_other(self, manifest: Manifest) -> None:
        """Raises `ValueError` for a store that another model on the same server has written."""
        if self.server is not None:
            self.server.refuse_other(manifest.teacher)

    def about(self, mixed_precision: str) -> dict[str, Any]:
        """The manifest's facts about the teacher. In the place of a server's weights stands its answer about one text.

        Args:
            mixed_precision: the student's.
        """
        if self.server is not None:
            return {
                "name": self.name, "revision": None, "weights": None, "dtype": "of the server", "quantization": None,
                "server": self.server.version, "watched": self.server.watched(),
            }  # fmt: skip
        model = causal_lm(self.teacher.model)
        kind = weights_kind(model)
        return {
            "name": self.name,
            "revision": getattr(model.config, "_commit_hash", None),
            "weights": weights_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": f"{kind[0]}bit" if kind[0].isdigit() else None,
            # A teacher is asked outside of the student's mixed precision, unless the engine has split it.
            "precision": mixed_precision if getattr(self.teacher, "sharded", False) else "no",
        }


def teacher_to_ask(teacher: Teacher) -> Asked:
    """The model or server inside of a teacher.

    Raises:
        `ValueError`: there is neither.
    """
    inner = source_of(teacher)
    if isinstance(inner, RemoteTeacher):
        return Asked(teacher.name, inner, None, inner)
    if not isinstance(inner, ModelTeacher):
        raise ValueError(
            f"a store is written of one teacher that is a model, here or behind an address; {teacher.name} "
            f"({type(inner).__name__}) is none. Of several teachers write a store each"
        )
    if isinstance(inner, BaseTeacher) and is_split(inner.model):
        raise ValueError(
            "teacher_model='base' is split by ZeRO-3 with its student, and cannot be asked before the training: give "
            "the base model by name as teacher_model, or write without DeepSpeed"
        )
    return Asked(teacher.name, inner, teacher.columns if isinstance(teacher, AcrossTeacher) else None, None)
