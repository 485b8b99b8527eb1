"""A teacher behind an address: the log-probabilities of the K most likely tokens, asked of a server of vLLM or SGLang.

Requests are made in `collate`, in the workers of the data loader, so that they wait while the student trains.

Shapes: N label-bearing positions of a batch, K entries at each, T tokens of a text.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.collators import Row
from hf_distill.losses.sparse import TopKSignal
from hf_distill.servers import Scores, TeacherAway, within
from hf_distill.servers.client import ENTRY_BYTES, Counts, Server, distance
from hf_distill.servers.dialects import DIALECTS, WHOLE
from hf_distill.servers.handshake import TOLD, WARNED, Expected, greet, name_of_model, roots
from hf_distill.store.documents import Documents
from hf_distill.teachers.brought import BroughtTeacher
from hf_distill.teachers.columns import PREFIX, AnyDataset, own_columns
from hf_distill.teachers.remote_verifier import RemoteVerifier, divergence_of_entries
from hf_distill.token_rows import longest_text
from hf_distill.verifying import Evidence, RolloutConfig

logger = logging.getLogger(__name__)

# Every request also contains this text. If the server has loaded another model, its answer changes.
WATCHED_TEXT = "The capital of France is Paris. Two plus two is four, and once upon a time there was a little"
MOST_WATCHED = 24  # tokens of it
WATCHED_ENTRIES = 8  # of each position, in a manifest
ANSWER_BYTES = 64 * 2**20  # of the answers for a batch, about: more only where the number of entries is said
COUNTED = 10**6  # what counts are multiplied by
WORKERS, PREFETCHED = 2, 2  # of the data loader, unless the user chose


def is_address(name: Any) -> bool:
    """True for the address of a server."""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


class RemoteTeacher(BroughtTeacher):
    """A model that a server has: what it says about token ids, at temperature 1, K tokens at each position.

    Where K is the whole vocabulary, every temperature can be taken. Otherwise the divergence is one over K + 1 outcomes
    ([`~hf_distill.losses.sparse.TopKSignal`]); the temperature has to be 1, because servers do not apply another one to
    the tokens of a prompt.

    Args:
        addresses: of one server or of copies of it, which share the rows, as `http://host:8000/v1`.
        args ([`KDConfig`]): settings; those of this teacher are `teacher_served_name`, `teacher_logprobs`,
            `teacher_timeout` and `teacher_key_variable`.
        index (`int`): its place among the teachers.

    Attributes:
        server ([`~hf_distill.servers.client.Server`]): asks.
        num_entries (`int`): K, after `introduce`.

    Raises:
        `ValueError`: no address of a server; nobody answers there.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    remembers = False
    eos_token_ids = ()  # a server does not tell

    def __init__(self, addresses: Sequence[str], args: Any, *, index: int) -> None:
        super().__init__("remote", index=index, num_proc=args.dataset_num_proc)
        self.counts_name = f"{PREFIX}counts_{index}"
        self.counts = Counts()
        self.args, self.drop_long_rows = args, args.drop_long_rows
        self.server = Server(roots(addresses), DIALECTS[0], "", args.teacher_key_variable, args.teacher_timeout)
        self.name = self.server.model = name_of_model(self.server, args.teacher_served_name)
        self.source = "a server"
        self.asked = self.num_entries = self.vocab_size = 0  # known after `introduce`

    @property
    def is_whole(self) -> bool:
        """True if the server tells the probabilities of all tokens."""
        return self.num_entries == self.vocab_size

    # ------------------------------------------------------------------------------------------------ at the start

    def introduce(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """Finds out what the server can do, and whether it fits the student.

        Raises:
            `ValueError`: what does not, and what to do about it.
        """
        self.tokenizer = tokenizer  # of prompts of its own
        text = tokenizer(WATCHED_TEXT, add_special_tokens=False)["input_ids"]
        text = tuple(int(i) for i in text if i < vocab_size)[:MOST_WATCHED]  # pyright: ignore[reportGeneralTypeIssues]
        expected = Expected(vocab_size, text, lambda token: str(tokenizer.decode([token])))
        served = greet(self.server, self.args.teacher_served_name, self.args.teacher_logprobs, expected)
        self.asked, self.vocab_size = served.num_entries, vocab_size
        self.num_entries = vocab_size if served.num_entries == WHOLE else served.num_entries
        # It answers with one token more than it reads.
        self.num_positions = None if served.max_length is None else served.max_length - 1
        self.version = served.version
        said = "the whole vocabulary" if self.is_whole else f"the {self.num_entries} most likely tokens"
        self.source = f"a server: {served.version}, {said}"
        if not self.is_whole:
            self._refuse_temperature()
        if served.noise > TOLD:
            logger.log(
                logging.WARNING if served.noise > WARNED else logging.INFO,
                "%s answers twice about one text with log-probabilities that are %.2g nats apart: its dtype and its "
                "batches decide the last digits", self.name, served.noise,
            )  # fmt: skip

    def _refuse_temperature(self) -> None:
        temperatures = {self.args.temperature, *(self.args.schedule or {}).get("temperature", ())}
        if temperatures != {1}:
            raise ValueError(
                f"temperature={max(temperatures)} needs the probabilities of the whole vocabulary, and {self.name} "
                f"tells those of {self.num_entries} tokens: servers give log-probabilities of a prompt at temperature "
                "1, whatever they are asked. Take temperature=1, or teacher_logprobs=-1 of a small vocabulary"
            )

    def bind(self, student: PreTrainedModel, accelerator: Accelerator, *, sharded: bool = False) -> None:
        """As in [`BroughtTeacher`]. The data loader gets workers, unless the user has chosen their number."""
        super().bind(student, accelerator, sharded=sharded)
        args = self.args
        if not args.asks_in_workers:
            return
        if args.chose_workers:
            if args.dataloader_num_workers == 0:
                logger.warning(
                    "dataloader_num_workers=0: each step waits for the answers of %s; with %d they come while the "
                    "student trains", self.name, WORKERS,
                )  # fmt: skip
            return
        args.dataloader_num_workers, args.dataloader_persistent_workers = WORKERS, True
        args.dataloader_prefetch_factor = args.dataloader_prefetch_factor or PREFETCHED

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """As in [`BroughtTeacher`].

        Raises:
            `ValueError`: rows that are longer than the server reads, or answers for a batch that are too large.
        """
        dataset = super().prepare(dataset, name)
        if isinstance(dataset, Dataset):
            first: Any = next(iter(dataset), {})
            self._refuse_long(*longest_text(dataset, self.columns_of(first)[0]), name)
        return dataset

    def _refuse_long(self, length: int, row: int, name: str) -> None:
        """Raises `ValueError` if the longest text, and where it is, are too much for the server or for a batch."""
        limit = self.num_positions
        if limit is not None and length > limit:
            raise ValueError(
                f"row {row} of the {name} dataset has {length} tokens, and {self.name} "
                f"reads {limit} at most: set max_length to at most {limit}, drop_long_rows=True, or start the server "
                "with a larger --max-model-len"
            )
        size = self.args.per_device_train_batch_size * length * self.num_entries * ENTRY_BYTES
        if self.args.teacher_logprobs == WHOLE and size > ANSWER_BYTES:
            raise ValueError(
                f"teacher_logprobs=-1 asks for {self.num_entries:,} log-probabilities of each token, in JSON up to "
                f"{size / 2**20:,.0f} MiB for a batch: take the most likely ones (teacher_logprobs=64), or say the "
                f"number, teacher_logprobs={self.num_entries}, if that is meant"
            )

    # ------------------------------------------------------------------------------------------------- of a store

    def watched(self) -> dict[str, Any]:
        """The server's scores of the watched text, as JSON, for a manifest."""
        watched = self.server.watched
        assert watched is not None
        ids, log_probs = (side[:, :WATCHED_ENTRIES] for side in watched.scores[:2])
        return {"text": list(watched.text), "ids": ids.tolist(), "log_probs": log_probs.round(4).tolist()}

    def refuse_other(self, about: Mapping[str, Any]) -> None:
        """Raises `ValueError` if what a manifest has of the watched text is that of another model."""
        watched, there = self.server.watched, about.get("watched") or {}
        assert watched is not None
        if there.get("text") != list(watched.text):
            return  # its tokenizer is another, which the manifest tells
        ids, log_probs = np.asarray(there["ids"], np.int32), np.asarray(there["log_probs"], np.float32)
        if (far := distance(Scores(ids, log_probs, watched.scores.own), watched.scores)) > watched.allowed:
            raise ValueError(
                f"the store was written by another model: about one text {self.name} says now what is {far:.2g} away "
                "from that, in probability. Take another output_dir"
            )

    # ------------------------------------------------------------------------------------------------- of a batch

    @property
    def collate(self) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        """Asks the server about the rows of a batch; [`TeacherAway`] where it does not answer."""
        return partial(
            ask_about,
            server=self.server,
            num_entries=self.asked,
            vocab_size=self.vocab_size,
            names=(f"{self.prefix}ids", f"{self.prefix}log_probs", self.counts_name),
            columns=self.columns,
        )

    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> TopKSignal:
        """The signal at flat `positions` (N,) of a batch, which `collate` has asked about."""
        for name, value in zip(asdict(self.counts), inputs[self.counts_name].tolist(), strict=True):
            self.counts.add(**{name: value / COUNTED})
        return TopKSignal(**self.read(inputs, positions), vocab_size=self.vocab_size)

    # ---------------------------------------------------------------------------------------------------- rollouts

    def verifier(
        self, prompt_ids: Tensor, prompt_mask: Tensor, config: RolloutConfig, vocab_size: int
    ) -> RemoteVerifier:
        """As in [`~hf_distill.teachers.WritingTeacher`]."""
        return RemoteVerifier(self.server, self.asked, prompt_ids, prompt_mask, config, vocab_size)

    def signal(self, evidence: Evidence) -> TopKSignal:
        """As in [`~hf_distill.teachers.WritingTeacher`]."""
        if not evidence:
            none = torch.zeros(0, self.num_entries)
            evidence = {"ids": none.int(), "log_probs": none}
        return TopKSignal(**evidence, vocab_size=self.vocab_size)

    def divergence(self, evidence: Evidence, other: Evidence, vocab_size: int) -> Tensor:
        """As in [`~hf_distill.teachers.WritingTeacher`], over the tokens that are known after both prompts."""
        return divergence_of_entries(evidence["ids"], evidence["log_probs"], other["ids"], other["log_probs"])

    def take_counts(self) -> dict[str, float]:
        """As in [`~hf_distill.teachers.Counting`], of the batches that were used, and of this process's rollouts."""
        self.counts.add(**asdict(self.server.take_counts()))
        counts, self.counts = asdict(self.counts), Counts()
        counts["megabytes"] = counts.pop("bytes") / 2**20
        return {name: float(value) for name, value in counts.items()}


def ask_about(
    rows: Sequence[Row],
    server: Server,
    num_entries: int,
    vocab_size: int,
    names: tuple[str, str, str],
    columns: tuple[str, str] | None,
) -> dict[str, Tensor]:
    """A server's ids and log-probabilities (N, K) at the label-bearing positions of a batch, rows in order.

    Raises:
        [`TeacherAway`]: the server does not answer, or gives a wrong answer.
    """
    documents = Documents.of_rows(rows, *(columns or own_columns(rows[0]))).with_labels()
    parts = [documents[i] for i in range(len(documents))]
    places = [np.flatnonzero(bears) - 1 for _, bears in parts]  # of the tokens before those that bear a label
    scores = server.score([ids.tolist() for ids, _ in parts], num_entries, [int(place[0]) for place in places])
    chosen = [
        within(Scores(*(side[place - place[0]] for side in each)), vocab_size)
        for each, place in zip(scores, places, strict=True)
    ]
    width = vocab_size if num_entries == WHOLE else num_entries
    none = Scores(np.zeros((0, width), np.int32), np.zeros((0, width), np.float32), np.zeros(0, np.float32))
    ids, log_probs, _ = (np.concatenate(side) for side in zip(none, *chosen, strict=True))
    if width == vocab_size and (ids < 0).any():
        raise TeacherAway(f"{server.model} has said nothing about some of the {vocab_size} tokens")
    # Integers, which no engine casts, and every device has.
    counts = torch.tensor([round(value * COUNTED) for value in asdict(server.take_counts()).values()])
    return dict(zip(names, (torch.from_numpy(ids), torch.from_numpy(log_probs), counts), strict=True))
