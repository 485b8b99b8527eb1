"""The three methods of a store: from a teacher's hidden states to arrays of documents, and back to a signal.

Shapes: N label-bearing positions of some documents, D the teacher's width, V vocabulary, K entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_distill.hidden_bytes import Rounding, restore_hidden, round_hidden
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.head import Head, default_chunk_size
from hf_distill.losses.sparse import SparseSignal, TopKSignal
from hf_distill.samplers import SparseTarget, multinomial, threshold
from hf_distill.store.manifest import Manifest
from hf_distill.store.shards import Stream
from hf_distill.target_bytes import PackedTargets, id_bits, pack_bits, pack_targets, unpack_bits, unpack_targets

Arrays = dict[str, np.ndarray]
SAMPLERS = ("threshold", "multinomial")
MOST_ENTRIES = 255  # of a position; a byte counts them
LOWEST = -1e4  # stored log-probability of a token that has none
# Positions that are sampled at a time on a CPU, so that their tensors stay in its cache: 16 of a large vocabulary, as
# many of a small one as have this many logits.
SAMPLED_ROWS, SAMPLED_LOGITS = 16, 2**18


class Format(Protocol):
    """A method of storing: hidden states to arrays of documents, and arrays to signals."""

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The arrays of a document."""
        ...

    def encode(self, signal: Any, keys: Sequence[bytes], counts: Sequence[int]) -> list[Arrays]:
        """The arrays of documents with `counts` label-bearing positions, N in all.

        The signal is that of a model or, for the most likely tokens, one that has them already.
        """
        ...

    def collate(self, documents: Sequence[Arrays]) -> dict[str, Tensor]:
        """Tensors of the N positions of documents, in the workers of the data loader."""
        ...

    def signal(self, tensors: Mapping[str, Tensor], head: Head | None) -> Any:
        """The teacher's signal at N positions; `head` is the store's, for hidden states."""
        ...


def format_of(manifest: Manifest, rounding: Rounding | None = None) -> Format:
    """The method of a store; `rounding` is needed to write hidden states."""
    if manifest.method == "hidden":
        assert manifest.head is not None
        return HiddenFormat(manifest.parameters["dtype"], manifest.head["width"], manifest.head["dtype"], rounding)
    if manifest.method == "sampled":
        return SampledFormat(manifest)
    return TopKFormat(manifest.vocab_size, manifest.parameters["entries"])


class HiddenFormat:
    """Hidden states with a scale for each position; the device multiplies them. [`~hf_distill.hidden_bytes`]

    Args:
        dtype: "float16" or "int8".
        width: D.
        head_dtype: that of the head, and of the hidden states that it is multiplied with.
        rounding: how states are rounded, to write them.
    """

    def __init__(self, dtype: str, width: int, head_dtype: str, rounding: Rounding | None = None) -> None:
        self.streams = {"hidden": Stream(dtype, (width,)), "scale": Stream("float32")}
        self.dtype, self.rounding = getattr(torch, head_dtype), rounding

    def encode(self, signal: TeacherSignal, keys: Sequence[bytes], counts: Sequence[int]) -> list[Arrays]:
        assert self.rounding is not None
        self.rounding = self.rounding.to(signal.hidden.device)
        values, scales = round_hidden(signal.hidden, self.rounding)
        return [{"hidden": values[part], "scale": scales[part]} for part in _parts(counts)]

    def collate(self, documents: Sequence[Arrays]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(_whole(documents, name, self.streams)) for name in self.streams}

    def signal(self, tensors: Mapping[str, Tensor], head: Head | None) -> TeacherSignal:
        assert head is not None
        return TeacherSignal(restore_hidden(tensors["hidden"], tensors["scale"], self.dtype), head)


class SampledFormat:
    """A sample of each distribution. [`~hf_distill.samplers`], [`~hf_distill.target_bytes`]"""

    def __init__(self, manifest: Manifest) -> None:
        self.vocab_size, self.temperature = manifest.vocab_size, manifest.temperature
        self.seed, self.entries, self.tau = (
            manifest.seed,
            manifest.parameters["entries"],
            manifest.chosen.get("tau", 0.0),
        )
        self.is_threshold = manifest.parameters["sampler"] == "threshold"
        self.streams = {
            "ids": Stream("uint8", ragged=True),
            "values": Stream("uint8", ragged=True),
            "num_entries": Stream("uint8"),
            "num_values": Stream("uint8"),
            "entropy": Stream("float16"),
        }

    def encode(self, signal: TeacherSignal, keys: Sequence[bytes], counts: Sequence[int]) -> list[Arrays]:
        draws = 1 if self.is_threshold else self.entries
        numbers = [uniforms(self.seed, key, count, draws) for key, count in zip(keys, counts, strict=True)]
        target = self._sampled(signal, np.concatenate(numbers))
        ids, weights, entropy, num_exact = (tensor.numpy() for tensor in target)
        num_values = num_exact if self.is_threshold else (weights > 0).sum(-1)
        found = []
        for part in _parts(counts):
            packed = pack_targets(ids[part], weights[part], num_values[part], self.vocab_size)
            found.append({**packed._asdict(), "entropy": entropy[part].astype(np.float16)})
        return found

    def _sampled(self, signal: TeacherSignal, numbers: np.ndarray) -> SparseTarget:
        """The targets of N positions, on the CPU; `numbers` are uniform, (N, draws)."""
        parts, start = [], 0
        for logits in chunks(signal, self.vocab_size):
            logits = logits.div_(self.temperature)
            rows = len(logits) if logits.is_cuda else max(SAMPLED_ROWS, SAMPLED_LOGITS // self.vocab_size)
            for some in logits.split(rows):
                drawn = torch.from_numpy(numbers[start : start + len(some)]).to(some.device)
                parts.append(self._sample(some, drawn))
                start += len(some)
        return SparseTarget(*(torch.cat([part[i] for part in parts]).cpu() for i in range(4)))

    def _sample(self, logits: Tensor, numbers: Tensor) -> SparseTarget:
        if self.is_threshold:
            return threshold(logits, MOST_ENTRIES, numbers.squeeze(-1), tau=self.tau)
        return multinomial(logits, self.entries, numbers)

    def collate(self, documents: Sequence[Arrays]) -> dict[str, Tensor]:
        parts = [self._unpacked(each) for each in documents]
        widest = max((part[0].shape[1] for part in parts), default=1)
        widths = [((0, 0), (0, widest - part[0].shape[1])) for part in parts]
        ids, weights = (
            np.concatenate(
                [np.zeros((0, widest), dtype), *(np.pad(part[i], w) for part, w in zip(parts, widths, strict=True))]
            )
            for i, dtype in enumerate((np.int32, np.float32))
        )
        entropy, num_values = (_whole(documents, name, self.streams) for name in ("entropy", "num_values"))
        num_exact = num_values.astype(np.int64) * self.is_threshold
        found = {"ids": ids, "weights": weights, "entropy": entropy.astype(np.float32), "num_exact": num_exact}
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _unpacked(self, document: Arrays) -> tuple[np.ndarray, np.ndarray]:
        packed = PackedTargets(**{name: document[name] for name in PackedTargets._fields})
        ids, weights = unpack_targets(packed, self.vocab_size)
        if ids.size and ids.max() >= self.vocab_size:
            raise ValueError(f"a document of the store has token {ids.max()}, and there are {self.vocab_size}")
        return ids, weights

    def signal(self, tensors: Mapping[str, Tensor], head: Head | None) -> SparseSignal:
        return SparseSignal(**tensors, temperature=self.temperature, vocab_size=self.vocab_size)


class TopKFormat:
    """The log-probabilities of the K most likely tokens, and of all others together, in float16."""

    def __init__(self, vocab_size: int, num_entries: int) -> None:
        self.vocab_size, self.num_entries = vocab_size, min(num_entries, vocab_size)
        self.streams = {
            "ids": Stream("uint8", ragged=True),
            "log_probs": Stream("float16", (self.num_entries,)),
            "log_tail": Stream("float16"),
        }

    def encode(self, signal: TeacherSignal | TopKSignal, keys: Sequence[bytes], counts: Sequence[int]) -> list[Arrays]:
        top = self._of_server(signal) if isinstance(signal, TopKSignal) else self._of_model(signal)
        ids, log_probs, log_tail = (side.numpy() for side in top)
        return [
            {
                "ids": pack_bits(ids[part].ravel(), id_bits(self.vocab_size)),
                "log_probs": log_probs[part].astype(np.float16),
                "log_tail": log_tail[part].astype(np.float16),
            }
            for part in _parts(counts)
        ]

    def _of_model(self, signal: TeacherSignal) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and log-probabilities (N, K), and the logarithm of what the others have (N,)."""
        parts = []
        for logits in chunks(signal, self.vocab_size):
            values, ids = logits.topk(self.num_entries)
            total = logits.logsumexp(-1, keepdim=True)
            tail = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1) - total.squeeze(-1)
            parts.append((ids.cpu(), (values - total).clamp_(min=LOWEST).cpu(), tail.cpu()))
        ids, log_probs, log_tail = (torch.cat(side) for side in zip(*parts, strict=True))
        return ids, log_probs, log_tail

    def _of_server(self, signal: TopKSignal) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a signal that has them. In the place of an entry that lacks comes a token without probability."""
        ids, log_probs = (side[:, : self.num_entries].cpu() for side in signal[:2])
        log_tail = torch.log1p(-log_probs.double().exp().sum(-1).clamp(max=1.0)).clamp(min=LOWEST)
        ids, lacking = ids.clone(), ids < 0
        for row in lacking.any(-1).nonzero().flatten().tolist():
            unused = torch.ones(self.vocab_size, dtype=torch.bool)
            unused[ids[row][~lacking[row]].long()] = False
            ids[row, lacking[row]] = unused.nonzero().flatten()[: int(lacking[row].sum())].to(ids.dtype)
        return ids, log_probs.clamp(min=LOWEST), log_tail.float()

    def collate(self, documents: Sequence[Arrays]) -> dict[str, Tensor]:
        bits = id_bits(self.vocab_size)
        ids = [unpack_bits(each["ids"], bits, each["log_probs"].size) for each in documents]
        log_probs, log_tail = (_whole(documents, name, self.streams) for name in ("log_probs", "log_tail"))
        found = {
            "ids": np.concatenate([np.zeros(0, np.int32), *ids]).reshape(-1, self.num_entries),
            "log_probs": log_probs.astype(np.float32),
            "log_tail": log_tail.astype(np.float32),
        }
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def signal(self, tensors: Mapping[str, Tensor], head: Head | None) -> TopKSignal:
        return TopKSignal(**tensors, vocab_size=self.vocab_size)


def sparse_fidelity(
    format: Format, signal: TeacherSignal | TopKSignal, vocab_size: int, temperature: float
) -> dict[str, float]:
    """The distance of sparse targets from the teacher's distributions t at N positions.

    Returns:
        "entries", the mean number of entries; "known_mass", the mean share of the probability that belongs to tokens
        whose own probability is known; "squared_error", the mean of `sum_v (w_v - t_v)^2`, w being zero where nothing
        is kept, if the teacher is a model.
    """
    tensors = format.collate(format.encode(signal, [b"probe"], [len(signal[0])]))
    is_top = "log_probs" in tensors
    weights = tensors["log_probs"].exp() if is_top else tensors["weights"]
    known = tensors.get("num_exact", torch.full((len(weights),), weights.shape[1]))
    is_known = torch.arange(weights.shape[1]) < known.unsqueeze(-1)
    found = {
        "entries": (weights > 0).sum(-1).double().mean().item(),
        "known_mass": (weights * is_known).sum(-1).double().mean().item(),
    }
    if isinstance(signal, TopKSignal):
        return found
    errors, start = [], 0
    for logits in chunks(signal, vocab_size):
        rows = slice(start, start + len(logits))
        probs = logits.div_(temperature).softmax(-1)
        ids = tensors["ids"][rows].long().to(logits.device)
        probs.scatter_add_(-1, ids, -weights[rows].to(logits.device, probs.dtype))
        errors.append(probs.square_().sum(-1))
        start += len(logits)
    return {**found, "squared_error": torch.cat(errors).double().mean().item()}


def uniforms(seed: int, key: bytes, count: int, draws: int) -> np.ndarray:
    """Numbers (count, draws) in [0, 1), float64, that depend on seed, document and position alone."""
    bits = np.random.Philox(key=int.from_bytes(key, "little"), counter=[0, 0, 0, seed])
    return np.random.Generator(bits).random((count, draws))


def chunks(signal: TeacherSignal, vocab_size: int) -> Iterator[Tensor]:
    """Logits (n, V) of the N positions, in float32 or better; the caller may write to them.

    Raises:
        `ValueError`: logits that are not finite. Those of a masked token may be minus infinity.
    """
    head = signal.head.truncated(vocab_size)
    hidden = signal.hidden.to(head.weight.device)
    for part in hidden.split(default_chunk_size(hidden.device, vocab_size)):
        logits = head.logits(part)
        if not bool(logits.amax(-1).isfinite().all()):
            raise ValueError("the teacher's logits are not finite: load it in another dtype")
        yield logits


def _whole(documents: Sequence[Arrays], name: str, streams: Mapping[str, Stream]) -> np.ndarray:
    """A stream of all documents, one after the other; there may be none."""
    kind = streams[name]
    return np.concatenate([np.zeros((0, *kind.shape), kind.dtype), *(each[name] for each in documents)])


def _parts(counts: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(np.cumsum([0, *counts]).tolist())]
