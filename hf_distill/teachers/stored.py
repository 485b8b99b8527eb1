"""A teacher whose outputs have been written to a folder: no weights but those of its head, and no forward.

Shapes: N label-bearing positions of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_distill.collators import Row
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.store.documents import Documents, keys_of_dataset
from hf_distill.store.formats import Format, format_of
from hf_distill.store.head import read_head
from hf_distill.store.hub import CACHE, find_store
from hf_distill.store.manifest import Manifest, is_store, read_manifest
from hf_distill.store.reader import Store
from hf_distill.store.shards import REMEDY
from hf_distill.teachers import Signal
from hf_distill.teachers.brought import BroughtTeacher
from hf_distill.teachers.columns import AnyDataset, own_columns

TOKENIZER = "tokenizer"  # the folder of the teacher's tokenizer
# Settings of a run that the tokens of its rows, and which of them bear a label, depend on.
ROW_SETTINGS = (
    "max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "packing_strategy", "eval_packing",
    "dataset_text_field",
)  # fmt: skip


def is_stored(name: Any) -> bool:
    """True for the name of a store: `cache:` and a folder, or a folder that is one."""
    return isinstance(name, str) and (name.startswith(CACHE) or is_store(name))


def row_settings(args: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings, and the student's `tokenizer` with its tokens and template, that the rows of a run depend on."""
    settings = {name: getattr(args, name) for name in ROW_SETTINGS}
    if args.packing_strategy != "bfd_split" or not (args.packing or args.eval_packing):
        settings |= {"packing_strategy": None, "eval_packing": None}  # texts are those of rows that are not packed
    return settings | {
        "tokenizer": fingerprint(sorted(tokenizer.get_vocab().items())),
        "eos_token": tokenizer.eos_token,
        "chat template": fingerprint(tokenizer.chat_template),
    }


def changes(writings: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """The settings of `now` that differ from every earlier writing.

    If there are none, those that differ from the most similar writing. A setting that a writing did not record does not
    differ from it.
    """
    differing = [{name for name in now if name in past and past[name] != now[name]} for past in writings]
    if not differing:
        return []
    changed = set.intersection(*differing) or min(differing, key=len)
    before = {
        name: dict.fromkeys(repr(past[name]) for past, other in zip(writings, differing, strict=True) if name in other)
        for name in now if name in changed
    }  # fmt: skip
    return [f"{name} was {' or '.join(past)} and is {now[name]!r}" for name, past in before.items()]


def fingerprint(value: Any) -> str:
    """A hash of what `repr` says of a value."""
    return blake2b(repr(value).encode(), digest_size=8).hexdigest()


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer in the folder of a store; `ValueError` if it is missing or damaged."""
    try:
        return AutoTokenizer.from_pretrained(folder / TOKENIZER)
    except Exception as error:  # of a damaged file tokenizers raises no class of its own
        raise ValueError(f"{folder / TOKENIZER} is missing or damaged: {REMEDY}") from error


def has_tokenizer(folder: Path, manifest: Manifest) -> bool:
    """True if the tokenizer in the folder of a store is the one that its manifest speaks of."""
    try:
        vocabulary = read_tokenizer(folder).get_vocab()
    except ValueError:
        return False
    return fingerprint(sorted(vocabulary.items())) == manifest.tokenizer["own"]


class StoredTeacher(BroughtTeacher):
    """The outputs of a teacher, read from a store.

    Args:
        folder: of the store.
        index (`int`): its place among the teachers, part of the names of its tensors.
        num_proc (`int`, *optional*): processes that prepare rows.
        fetch (*optional*): downloads the data of shards, by name, of a store that is on the hub.

    Raises:
        `ValueError`: no store, a damaged one, or one of a newer format.
    """

    def __init__(
        self,
        folder: str,
        *,
        index: int = 0,
        num_proc: int | None = None,
        fetch: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        super().__init__("stored", index=index, num_proc=num_proc)
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.format: Format = format_of(self.manifest)
        self.store = Store(self.folder, self.format.streams, fetch=fetch)
        self.name = self.manifest.teacher["name"]
        self.source = f"a store: {self.manifest.kind}"
        self._run: tuple[Any, PreTrainedTokenizerBase] | None = None  # settings and the student's tokenizer
        self._settings: dict[str, Any] = {}  # of this run, that rows depend on

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, as it was when the store was written."""
        return read_tokenizer(self.folder)

    def introduce(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """As in [`~hf_distill.teachers.Introduced`]: probabilities are normalised over one vocabulary."""
        if self.manifest.method != "hidden" and vocab_size != self.manifest.vocab_size:
            raise ValueError(
                f"the store in {self.folder} has probabilities over {self.manifest.vocab_size} tokens, and this run "
                f"has {vocab_size}: write it with the student of this run, or a store of hidden states"
            )

    def refuse_settings(self, args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `ValueError` for settings of a run ([`KDConfig`]) that a store cannot serve.

        `tokenizer` is the student's.
        """
        self._run = args, tokenizer
        if args.packing and args.packing_strategy == "wrapped":
            raise ValueError(
                "packing_strategy='wrapped' cuts texts wherever a row ends, so that they are in no store: take 'bfd'"
            )
        quantization, stored = args.teacher_quantization, self.manifest.teacher.get("quantization")
        if quantization not in (None, stored):
            raise ValueError(
                f"the store in {self.folder} was written by a teacher with teacher_quantization={stored!r}, and this "
                f"run asks for {quantization!r}: remove the setting, or write another store"
            )
        wanted = (args.teacher_model_init_kwargs or {}).get("dtype")
        if wanted is not None and str(wanted).removeprefix("torch.") not in ("auto", self.manifest.teacher["dtype"]):
            raise ValueError(
                f"the store in {self.folder} was written by a teacher in {self.manifest.teacher['dtype']}, and this "
                f"run asks for dtype {wanted}: remove the setting, or write another store"
            )
        temperatures = (args.schedule or {}).get("temperature", [args.temperature])
        self.manifest.refuse_loss(args.divergence, set(temperatures), self.folder)

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Rows with the tokens of their `teacher_prompt`.

        Raises:
            `ValueError`: rows that are not in the store; their number, the first of them, and the likely reason. Rows
                without tokens.
        """
        if self._run is not None:  # the trainer has given the tokenizer the tokens and the template of the settings
            self._settings = row_settings(*self._run)
        dataset = super().prepare(dataset, name)
        columns = self.columns_of(next(iter(dataset), {}))
        if isinstance(dataset, Dataset):
            self.refuse_missing(*keys_of_dataset(dataset, *columns), name)
        else:  # what a stream needs is known when it comes
            self.store.require(np.arange(len(self.store)))
        return dataset

    def refuse_missing(self, keys: np.ndarray, rows: np.ndarray, name: str) -> None:
        """Raises `ValueError` for documents of a data set, by keys (n, 16) and rows (n,), that are not in the store."""
        numbers = self.store.find(keys)
        self.store.require(numbers[numbers >= 0])
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            raise ValueError(
                f"{len(missing):,} of {len(numbers):,} texts of the {name} dataset are not in the store {self.folder}; "
                f"the first is in row {rows[missing[0]]}. {self.reason()}"
            )

    def reason(self) -> str:
        """Why texts may be missing, for messages: what has changed since the store was written."""
        if changed := changes(self.manifest.rows, self._settings):
            return (
                f"Since it was written, settings have changed that tokens and labels depend on: {'; '.join(changed)}. "
                "Take the old ones, or add these texts with `hf-distill cache write`"
            )
        return "Settings are those of its writing, so these texts are new: add them with `hf-distill cache write`"

    @property
    def collate(self) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        """Reads what the store has of the rows of a batch."""
        return partial(
            read_rows,
            store=self.store,
            format=self.format,
            prefix=self.prefix,
            columns=self.columns,
            reason=self.reason(),
        )

    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> Signal:
        """The signal at flat `positions` (N,) of a batch, which `collate` has read."""
        return self.format.signal(self.read(inputs, positions), None)


class StoredHiddenTeacher(StoredTeacher):
    """The hidden states of a teacher, read from a store, and its head: every divergence, temperature and combination.

    Attributes:
        head (`Head`): on the device where it was last used.
    """

    def __init__(self, folder: str, **kwargs: Any) -> None:
        super().__init__(folder, **kwargs)
        assert self.manifest.head is not None
        self.head = read_head(self.folder, self.manifest.head)

    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> TeacherSignal:
        """As in [`StoredTeacher`]."""
        self.head = self.head.to(positions.device)
        return self.format.signal(self.read(inputs, positions), self.head)


def open_store(name: str, *, index: int, num_proc: int | None) -> StoredTeacher:
    """The teacher of a store: a folder or a dataset on the hub, with or without `cache:` before it.

    Raises:
        `ValueError`: no store, a damaged one, one of a newer format, or a hub that is away.
    """
    folder, fetch = find_store(name)
    kind = StoredHiddenTeacher if read_manifest(folder).method == "hidden" else StoredTeacher
    return kind(str(folder), index=index, num_proc=num_proc, fetch=fetch)


def read_rows(
    rows: Sequence[Row],
    store: Store,
    format: Format,
    prefix: str,
    columns: tuple[str, str] | None,
    reason: str,
) -> dict[str, Tensor]:
    """The stored tensors of a batch, flat over its label-bearing positions, rows in order.

    Raises:
        `ValueError`: a text that is not in the store, or a damaged shard.
    """
    documents = Documents.of_rows(rows, *(columns or own_columns(rows[0]))).with_labels()
    numbers = store.find(documents.keys())
    if (numbers < 0).any():
        raise ValueError(
            f"{int((numbers < 0).sum())} of {len(numbers)} texts of a batch are not in the store. {reason}"
        )
    return {prefix + name: tensor for name, tensor in format.collate(store.read(numbers.tolist())).items()}
