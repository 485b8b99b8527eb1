"""Writing a store: the teacher is asked about every document of some data sets, once.

Everything is fixed before the first forward: which documents, in which batches, in which shards, in which process. So a
run that was killed goes on where it was, and ends in the same bytes as one without a break.

Shapes: B documents of a batch, T tokens, N label-bearing positions.
"""

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import convert_bytes
from datasets.utils import tqdm
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from hf_distill.hidden_bytes import Rounding, choose_rounding, folded_head
from hf_distill.losses.sparse import TopKSignal
from hf_distill.modeling import label_positions
from hf_distill.samplers import likeliest, tau_for
from hf_distill.saving import save_tokenizer
from hf_distill.store.documents import KEY_BYTES, Documents
from hf_distill.store.formats import (
    MOST_ENTRIES,
    SAMPLERS,
    Arrays,
    Format,
    chunks,
    format_of,
    sparse_fidelity,
)
from hf_distill.store.head import HEAD, ROUNDING, read_head, read_rounding, write_head, write_rounding
from hf_distill.store.manifest import METHODS, Manifest, is_store, read_manifest
from hf_distill.store.plan import SHARD_BYTES, Plan, begun, divided
from hf_distill.store.reader import Store, remove_damaged, remove_leftovers
from hf_distill.store.shards import PART, PLAN, shard_names, write_file, write_shard
from hf_distill.target_bytes import id_bits
from hf_distill.teachers.stored import TOKENIZER, has_tokenizer
from hf_distill.token_rows import pad

logger = logging.getLogger(__name__)

PROBE_POSITIONS = 2048  # on which a rounding, or tau, is chosen and the fidelity measured
LOCK = "writing.lock"
POLLING = 1.0  # seconds between two looks at what other processes have written
LIBRARIES = ("hf_distill", "torch", "transformers", "numpy", "safetensors")
BEGUN = {TOKENIZER, HEAD, ROUNDING, PLAN, LOCK}  # what a folder may hold before it has a manifest
DTYPES = ("float16", "int8")


@dataclass(frozen=True)
class Method:
    """The method of a store, and its settings.

    Args:
        store: "hidden" (states), "sampled" (probabilities) or "topk" (probabilities).
        dtype: of hidden states, "float16" or "int8".
        entries: the number of entries at a position. With the sampler "threshold" it is the mean number, with
            "multinomial" the number of draws.
        sampler: "threshold" or "multinomial".
        seed: of samples and rotations.

    Raises:
        `ValueError`: an unknown name, or a number that cannot be had.
    """

    store: str = "hidden"
    dtype: str = "float16"
    entries: float = 12
    sampler: str = "threshold"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("store", self.store, METHODS), ("dtype", self.dtype, DTYPES), ("sampler", self.sampler, SAMPLERS)
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} has to be one of {', '.join(known)}, got {value!r}")
        is_mean = self.store == "sampled" and self.sampler == "threshold"
        is_number = isinstance(self.entries, int | float) and not isinstance(self.entries, bool)
        most = MOST_ENTRIES if self.store == "sampled" else math.inf
        if not (is_number and 1 <= self.entries <= most and (is_mean or float(self.entries).is_integer())):
            kind = "a number" if is_mean else "a whole number"
            limits = f"from 1 to {most}" if self.store == "sampled" else "from 1"
            raise ValueError(f"entries has to be {kind} {limits}, got {self.entries!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed has to be a whole number from 0 to 2**63 - 1, got {self.seed!r}")


class StoreWriter:
    """Asks a teacher about documents, and writes what it says into a folder.

    Args:
        teacher ([`ModelTeacher`] or [`~hf_distill.teachers.remote.RemoteTeacher`]): of a server only the most likely
            tokens can be kept.
        documents ([`Documents`]): of all data sets.
        method ([`Method`]): what is kept.
        accelerator: of the run; each process writes its share.
        about: what the manifest has to say of teacher, tokenizer and rows.
        vocab_size, temperature: of the run.
        batch_size: documents of a forward.
        refuse: raises `ValueError` for a store of another teacher, as far as its manifest alone does not tell.
    """

    def __init__(
        self,
        teacher: Any,
        documents: Documents,
        method: Method,
        accelerator: Accelerator,
        *,
        about: Mapping[str, dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        temperature: float,
        batch_size: int,
        refuse: Callable[[Manifest], None] = lambda manifest: None,
    ) -> None:
        self.teacher, self.method, self.accelerator, self.tokenizer = teacher, method, accelerator, tokenizer
        self.documents = documents.with_labels().distinct()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size has to be a whole number from 1, got {batch_size!r}")
        if not len(self.documents):
            raise ValueError("no row has a label-bearing token, so there is nothing to write")
        self.batch_size, self.about, self.refuse = batch_size, about, refuse
        self.vocab_size, self.run_temperature = vocab_size, temperature
        self._probe: Any = None

    @property
    def temperature(self) -> float:
        """At which probabilities are taken."""
        return self.run_temperature if self.method.store == "sampled" else 1.0

    # ------------------------------------------------------------------------------------------------ the teacher

    def ask(self, ids: Sequence[np.ndarray], bears_label: Sequence[np.ndarray]) -> Any:
        """The teacher's signal at the N label-bearing positions of B documents, in order."""
        labels = [np.where(own, row, -100).tolist() for row, own in zip(ids, bears_label, strict=True)]
        rows = [{"input_ids": row.tolist(), "labels": own} for row, own in zip(ids, labels, strict=True)]
        tokens, mask = pad([row["input_ids"] for row in rows], 0)
        device = self.accelerator.device
        positions, _ = label_positions(pad(labels, -100)[0].to(device))
        inputs = {"input_ids": tokens.to(device), "attention_mask": mask.long().to(device)}
        with torch.no_grad():
            return self.teacher({**inputs, **self.teacher.collate(rows)}, positions)

    def probe(self) -> Any:
        """The teacher's signal at some thousand positions of documents from all over the data."""
        if self._probe is None:
            chosen = self._probe_documents()
            parts = [
                self.ask(*zip(*(self.documents[int(i)] for i in chosen[start : start + self.batch_size]), strict=True))
                for start in range(0, len(chosen), self.batch_size)
            ]
            self._probe = _joined(parts)
        return self._probe

    def _probe_documents(self) -> np.ndarray:
        """Indices of documents, evenly spread, that have `PROBE_POSITIONS` or as many as there are."""
        num_labels = self.documents.num_labels
        number = len(num_labels)
        count = min(number, max(8, int(np.ceil(PROBE_POSITIONS / num_labels.mean()))))
        while True:
            chosen = np.unique(np.linspace(0, number - 1, count).round().astype(np.int64))
            if num_labels[chosen].sum() >= PROBE_POSITIONS or count == number:
                return chosen
            count = min(number, 2 * count)

    # ------------------------------------------------------------------------------------------------ the store

    def write(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> Manifest:
        """Writes all documents that the store in `folder` lacks.

        Raises:
            `ValueError`: a folder of something else, the store of another teacher or method, another process that
                writes into it, or too little room.
            `OSError`: the disk is full, or gone. What has been written stays.
        """
        with self._alone(folder):
            manifest, format = self._begin(folder)
            plan = self._plan(folder, format, shard_bytes)
            self._write_shards(folder, plan, format)
            self._wait_for_shards(folder, plan)
            store = Store(folder, format.streams)
            manifest = replace(manifest, counts={**store.counts(), "head_bytes": (manifest.head or {}).get("bytes", 0)})
            if self.accelerator.is_main_process:
                manifest.write(folder)
                (folder / PLAN).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        return manifest

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Holds the folder's lock, in one process of the run."""
        if not self.accelerator.is_main_process:
            yield
            return
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: take another output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        others = {path.name for path in folder.iterdir() if path.suffix != PART} - BEGUN
        if others and not is_store(folder):
            raise ValueError(f"{folder} holds something else than a store ({min(others)}): take another output_dir")
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"another process is writing into {folder}: wait for it, or take another output_dir"
            ) from error
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held, so that no two processes hold two files
            lock.release()

    def _begin(self, folder: Path) -> tuple[Manifest, Format]:
        """The manifest of the store, which is written if there is none, and its format."""
        asked, is_main = self._asked(), self.accelerator.is_main_process
        if not is_store(folder):
            manifest, rounding = self._chosen(asked)
            self.accelerator.wait_for_everyone()
            if is_main:
                room = self.position_bytes(format_of(manifest, rounding)) * self.documents.num_labels.sum()
                self._refuse_full(folder, room + self._head_bytes)
                self._write_beginning(folder, manifest, rounding)
        self.accelerator.wait_for_everyone()
        there = read_manifest(folder)
        there.refuse_other(asked, folder)
        self.refuse(there)
        manifest = there.with_rows_of(asked)
        if is_main and manifest != there:
            manifest.write(folder)
        if is_main and not has_tokenizer(folder, manifest):
            logger.warning("%s is missing or damaged; it is written again", folder / TOKENIZER)
            self._save_tokenizer(folder)
        if manifest.head is None:
            return manifest, format_of(manifest)
        rounding = read_rounding(folder, self.method.dtype, manifest.chosen)
        if is_main:
            manifest = self._with_whole_head(folder, manifest, rounding)
        return manifest, format_of(manifest, rounding)

    def _write_beginning(self, folder: Path, manifest: Manifest, rounding: Rounding | None) -> None:
        """Writes all but shards; the manifest last, since with it the folder is a store."""
        self._save_tokenizer(folder)
        if rounding is not None:
            head = write_head(folder, folded_head(self.teacher.head, rounding))
            manifest = replace(manifest, chosen=write_rounding(folder, rounding), head=head)
        manifest.write(folder)

    def _save_tokenizer(self, folder: Path) -> None:
        """Writes each file of the tokenizer as every file of a store: whole or not at all.

        The error of a full disk names the file.
        """
        with TemporaryDirectory() as elsewhere:
            save_tokenizer(self.tokenizer, Path(elsewhere))
            for path in sorted(path for path in Path(elsewhere).rglob("*") if path.is_file()):
                place = folder / TOKENIZER / path.relative_to(elsewhere)
                place.parent.mkdir(parents=True, exist_ok=True)
                write_file(place, path.read_bytes())

    def _with_whole_head(self, folder: Path, manifest: Manifest, rounding: Rounding) -> Manifest:
        """The manifest of a store whose head is there; it is written again if it is missing or damaged."""
        assert manifest.head is not None
        try:
            read_head(folder, manifest.head)
        except ValueError as error:
            logger.warning("%s; it is written again", str(error).partition(": ")[0])
            manifest = replace(manifest, head=write_head(folder, folded_head(self.teacher.head, rounding)))
            manifest.write(folder)
        return manifest

    @property
    def _head_bytes(self) -> int:
        return self.teacher.head.weight.nbytes if self.method.store == "hidden" else 0

    def _asked(self) -> Manifest:
        """The manifest as far as settings tell it."""
        method, head = self.method, None
        parameters: dict[str, Any] = {"dtype": method.dtype}
        if method.store == "hidden":
            weight = self.teacher.head.weight
            head = {"width": weight.shape[1], "dtype": str(weight.dtype).removeprefix("torch.")}
        elif method.store == "sampled":
            parameters = {"sampler": method.sampler, "entries": method.entries}
        elif method.store == "topk":
            parameters = {"entries": min(int(method.entries), self.vocab_size)}
        return Manifest(
            method.store, parameters, self.about["teacher"], self.about["tokenizer"], self.vocab_size, self.temperature,
            method.seed, head=head, rows=[self.about["rows"]],
            versions={name: version(name) for name in LIBRARIES},
        )  # fmt: skip

    def _chosen(self, asked: Manifest) -> tuple[Manifest, Rounding | None]:
        """The manifest with what a probe chooses and measures, and the rounding of hidden states."""
        signal, vocab_size = self.probe(), self.vocab_size
        if asked.method == "hidden":
            rounding, fidelity = choose_rounding(
                signal.hidden, self.teacher.head, self.method.dtype, vocab_size=vocab_size, seed=asked.seed
            )
            return replace(asked, fidelity=fidelity), rounding
        asked = self._with_tau(asked)
        return replace(asked, fidelity=sparse_fidelity(format_of(asked), signal, vocab_size, self.temperature)), None

    def _with_tau(self, asked: Manifest) -> Manifest:
        """The manifest with the tau of the threshold sampler. For other methods, the manifest as it is."""
        if asked.parameters.get("sampler") != "threshold":
            return asked
        logits = (chunk.div_(self.temperature) for chunk in chunks(self.probe(), self.vocab_size))
        probs = torch.cat([likeliest(chunk, MOST_ENTRIES).double().cpu() for chunk in logits])
        return replace(asked, chosen={"tau": tau_for(probs, self.method.entries)})

    def _plan(self, folder: Path, format: Format, shard_bytes: int) -> Plan:
        """The documents to write, in batches and shards; `ValueError` if the disk has no room for them."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        names = shard_names(folder)[rank::processes]
        self.accelerator.wait_for_everyone()  # all have looked, before one removes a shard
        # Each checks its share: while one reads terabytes, the others would give up waiting.
        remove_damaged(folder, format.streams, names, hide=rank > 0)
        self.accelerator.wait_for_everyone()
        keys = self.documents.keys()
        settings = f"{self.batch_size}-{processes}-{shard_bytes}"

        def missing(shards: Sequence[str]) -> np.ndarray:
            return np.flatnonzero(Store(folder, format.streams, shards).find(keys) < 0)

        def key_of(shards: Sequence[str]) -> str:
            return f"{settings}-{blake2b(keys[missing(shards)].tobytes(), digest_size=16).hexdigest()}"

        if self.accelerator.is_main_process:
            remove_leftovers(folder)
            begun(folder, key_of)
        self.accelerator.wait_for_everyone()
        run = begun(folder, key_of)
        documents, shards = divided(
            self.documents.take(missing(run["before"])), batch_size=self.batch_size,
            position_bytes=self.position_bytes(format), shard_bytes=shard_bytes, num_processes=processes,
        )  # fmt: skip
        plan = Plan(run["run"], run["before"], documents, shards)
        there = set(shard_names(folder))
        left = [batch for i, shard in enumerate(shards) if plan.name(i) not in there for batch in shard]
        num_labels = documents.num_labels
        self._refuse_full(folder, self.position_bytes(format) * sum(num_labels[batch].sum() for batch in left))
        return plan

    def _refuse_full(self, folder: Path, need: float) -> None:
        """Raises `ValueError` if the disk has less than `need` bytes free."""
        if need > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"the store needs about {convert_bytes(need)} more, and {convert_bytes(free)} are free in {folder}: "
                "make room, or take a smaller store (--dry_run shows the bytes of each)"
            )

    def position_bytes(self, format: Format) -> float:
        """About the bytes of a label-bearing position in the files: a number that settings alone decide."""
        fixed = sum(stream.num_bytes for stream in format.streams.values() if not stream.ragged)
        ragged = {"hidden": 0.0, "topk": id_bits(self.vocab_size) / 8, "sampled": id_bits(self.vocab_size) / 8 + 1}
        return fixed + ragged[self.method.store] * self.method.entries

    def _write_shards(self, folder: Path, plan: Plan, format: Format) -> None:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        todo = [plan.to_do(folder, process, processes) for process in range(processes)]
        # A teacher that is split over the processes is asked by all of them at once.
        forwards = [sum(len(plan.shards[shard]) for shard in shards) for shards in todo]
        spare = max(forwards) - forwards[rank] if getattr(self.teacher, "sharded", False) else 0
        num_tokens, done = plan.documents.num_tokens, 0
        total = sum(int(num_tokens[batch].sum()) for shard in todo[rank] for batch in plan.shards[shard])
        hide = not self.accelerator.is_main_process
        with tqdm(total=total, desc="Writing the store", unit=" tokens", unit_scale=True, disable=hide or None) as bar:
            for shard in todo[rank]:
                arrays: list[Arrays] = []
                for batch in plan.shards[shard]:
                    arrays += self._encoded(plan.documents, batch, format)
                    bar.update(int(num_tokens[batch].sum()))
                chosen = plan.documents.take(np.concatenate(plan.shards[shard]))
                done += write_shard(folder, plan.name(shard), chosen.keys(), arrays, format.streams)
                bar.set_postfix_str(f"{convert_bytes(done)} of about {convert_bytes(done * total / max(bar.n, 1))}")
            for _ in range(spare):
                self._asked_about(plan.documents, plan.shards[0][0])

    def _wait_for_shards(self, folder: Path, plan: Plan) -> None:
        """Returns when all processes have written theirs. A barrier alone would give up after half an hour."""
        processes = range(self.accelerator.num_processes)
        while any(plan.to_do(folder, process, len(processes)) for process in processes):
            time.sleep(POLLING)
        self.accelerator.wait_for_everyone()

    def _encoded(self, documents: Documents, batch: np.ndarray, format: Format) -> list[Arrays]:
        signal = self._asked_about(documents, batch)
        chosen = documents.take(batch)
        return format.encode(signal, [*map(bytes, chosen.keys())], chosen.num_labels.tolist())

    def _asked_about(self, documents: Documents, batch: np.ndarray) -> Any:
        return self.ask(*zip(*(documents[int(i)] for i in batch), strict=True))

    def estimates(self) -> list[dict[str, Any]]:
        """The bytes and seconds of every kind of store for the documents, from what a probe takes; nothing is written.

        Returns:
            For each a dict with "store" (what it is), "position_bytes", "bytes" (of all files but the head),
            "head_bytes" and "seconds", with all processes at work.
        """
        self.probe()  # warms up
        self._probe, start = None, time.perf_counter()
        signal = self.probe()
        seconds = time.perf_counter() - start
        num_tokens = self.documents.num_tokens
        forward = seconds * num_tokens.sum() / num_tokens[self._probe_documents()].sum()
        entries, sampler, seed = self.method.entries, self.method.sampler, self.method.seed
        kinds = [
            Method("hidden", "float16"),
            Method("hidden", "int8", seed=seed),
            Method("sampled", entries=entries, sampler=sampler, seed=seed),
            Method("topk", entries=round(entries)),
        ]
        kinds = kinds[-1:] if isinstance(signal, TopKSignal) else kinds  # a server tells nothing else
        return [self._of_kind(kind)._estimate(signal, forward) for kind in kinds]

    def _of_kind(self, method: Method) -> "StoreWriter":
        other = copy.copy(self)
        other.method = method
        return other

    def _estimate(self, signal: Any, forward: float) -> dict[str, Any]:
        manifest = self._with_tau(self._asked())
        format = format_of(manifest, Rounding(self.method.dtype, "token"))  # a basis changes no byte count
        start, positions = time.perf_counter(), len(signal[0])
        arrays = format.encode(signal, [b"probe"], [positions])[0]
        encoding = (time.perf_counter() - start) / positions
        num_labels = self.documents.num_labels
        index = (KEY_BYTES + 4 * (1 + sum(stream.ragged for stream in format.streams.values()))) / num_labels.mean()
        position_bytes = sum(array.nbytes for array in arrays.values()) / positions + index
        return {
            "store": manifest.kind,
            "position_bytes": position_bytes,
            "bytes": position_bytes * num_labels.sum(),
            "head_bytes": self._head_bytes,
            "seconds": (forward + encoding * num_labels.sum()) / self.accelerator.num_processes,
        }


def _joined(parts: Sequence[Any]) -> Any:
    """One signal at the positions of several, one after the other."""
    first = parts[0]
    if isinstance(first, TopKSignal):
        return first._replace(**{name: torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "log_probs")})
    return first._replace(hidden=torch.cat([part.hidden for part in parts]).to(first.head.weight.device))
