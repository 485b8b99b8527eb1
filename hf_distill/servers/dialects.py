"""The words of servers: a question as JSON, and an answer as arrays. vLLM's completions, and SGLang's `/generate`.

Every answer is looked at before it counts: as many positions as tokens, the tokens that were sent, numbers that are
log-probabilities. The functions here are pure; they know no network.

Shapes: T tokens of a text, K entries at a position.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hf_distill.servers import Scores, WrongAnswer

# Above this no logarithm of a probability lies, whatever the rounding of the server's dtype.
LARGEST_LOG_PROB = 1e-3
# Probabilities that sum to more are none.
LARGEST_MASS = 1.02
# Numbers that stand for a logarithm of zero in JSON.
LOWEST = -1e4
WHOLE = -1  # entries: the whole vocabulary


Texts = Sequence[Sequence[int]]


class Question(NamedTuple):
    """A request: the path after the server's root, and the body."""

    path: str
    body: dict[str, Any]


class Sampling(NamedTuple):
    """The sampling of a continuation; a temperature of 0 is greedy."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: tuple[int, ...]


class Dialect(Protocol):
    """The words of one kind of server."""

    name: str
    most: str
    """The option of the server's command line that limits the entries."""
    has_whole: bool
    """True if -1 asks for the whole vocabulary."""

    def scoring(self, model: str, texts: Texts, num_entries: int) -> Question:
        """Asks about the tokens of some texts."""
        ...

    def scores(
        self, answer: Any, texts: Sequence[Sequence[int]], num_entries: int, starts: Sequence[int]
    ) -> list[Scores]:
        """Scores of each text, from the one of token `starts[i] + 1` on; `WrongAnswer` for what is none."""
        ...

    def texts(self, answer: Any) -> dict[int, str]:
        """The text of each token that an answer to `scoring` names."""
        ...

    def generating(self, model: str, prompt: Sequence[int], sampling: Sampling) -> Question:
        """Asks for one continuation of one prompt."""
        ...

    def continuation(self, answer: Any, prompt: Sequence[int]) -> list[int]:
        """The tokens of a continuation, the one that ended it included; `WrongAnswer` for what is none."""
        ...


class VLLM:
    """`POST /v1/completions` with `prompt_logprobs`, as vLLM has it."""

    name = "vLLM"
    most = "--max-logprobs"
    has_whole = True

    def scoring(self, model: str, texts: Texts, num_entries: int) -> Question:
        body = {"model": model, "prompt": [list(text) for text in texts], "max_tokens": 1, "temperature": 0}
        return Question("/v1/completions", {**body, "prompt_logprobs": num_entries})

    def scores(
        self, answer: Any, texts: Sequence[Sequence[int]], num_entries: int, starts: Sequence[int]
    ) -> list[Scores]:
        choices = _listed(answer, "choices", len(texts))
        choices = sorted(choices, key=lambda choice: choice.get("index", 0))
        found = []
        for text, start, choice in zip(texts, starts, choices, strict=True):
            positions = choice.get("prompt_logprobs")
            if positions is None:
                raise WrongAnswer("there are no prompt_logprobs in the answer")
            _same_length(positions, text)
            rows = []
            for token, entries in zip(text[start + 1 :], positions[start + 1 :], strict=True):
                if not isinstance(entries, Mapping) or str(token) not in entries:
                    raise WrongAnswer(f"token {token} was sent, and the answer speaks of others at its place")
                rows.append(([*map(int, entries)], [entry["logprob"] for entry in entries.values()]))
            found.append(_scores(rows, text[start + 1 :], num_entries))
        return found

    def texts(self, answer: Any) -> dict[int, str]:
        return {
            int(token): entry["decoded_token"]
            for choice in answer["choices"]
            for entries in choice["prompt_logprobs"] or ()
            for token, entry in (entries or {}).items()
            if isinstance(entry.get("decoded_token"), str)
        }

    def generating(self, model: str, prompt: Sequence[int], sampling: Sampling) -> Question:
        # All that a model's own generation config would otherwise decide is said.
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": sampling.max_tokens, "seed": sampling.seed,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        return Question("/v1/completions", body)

    def continuation(self, answer: Any, prompt: Sequence[int]) -> list[int]:
        (choice,) = _listed(answer, "choices", 1)
        if choice.get("prompt_token_ids") not in (None, list(prompt)):
            raise WrongAnswer("the tokens of the prompt come back as others")
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids:
            raise WrongAnswer("there are no token_ids in the answer: a newer vLLM is needed to let it write")
        return [*map(int, ids)]


class SGLang:
    """`POST /generate` with `return_logprob`, as SGLang has it."""

    name = "SGLang"
    most = "(none: SGLang has no limit)"
    has_whole = False  # more entries than its vocabulary has would end it

    def scoring(self, model: str, texts: Texts, num_entries: int) -> Question:
        body = {
            "input_ids": [list(text) for text in texts], "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True, "logprob_start_len": 0,
            "top_logprobs_num": num_entries,
            "return_text_in_logprobs": True,
        }  # fmt: skip
        return Question("/generate", body)

    def scores(
        self, answer: Any, texts: Sequence[Sequence[int]], num_entries: int, starts: Sequence[int]
    ) -> list[Scores]:
        found = []
        for text, start, each in zip(texts, starts, _listed(answer, None, len(texts)), strict=True):
            meta = each.get("meta_info") or {}
            own, top = meta.get("input_token_logprobs"), meta.get("input_top_logprobs")
            if own is None or top is None:
                raise WrongAnswer("there are no input_token_logprobs and input_top_logprobs in the answer")
            for part in (own, top):
                _same_length(part, text)
            rows = []
            for token, (log_prob, own_id, *_), entries in zip(
                text[start + 1 :], own[start + 1 :], top[start + 1 :], strict=True
            ):
                if own_id not in (token, 0):  # it writes 0 for the last id of its vocabulary
                    raise WrongAnswer(f"token {token} was sent, and the answer has {own_id} at its place")
                known = [(int(entry[1]), entry[0]) for entry in entries or ()]
                known += [(token, log_prob)] if token not in dict(known) else []
                rows.append(([each[0] for each in known], [each[1] for each in known]))
            found.append(_scores(rows, text[start + 1 :], num_entries))
        return found

    def texts(self, answer: Any) -> dict[int, str]:
        return {
            int(token): text
            for each in answer
            for token, text in (entry[1:3] for entry in each["meta_info"]["input_token_logprobs"])
            if isinstance(text, str)
        }

    def generating(self, model: str, prompt: Sequence[int], sampling: Sampling) -> Question:
        params = {
            "max_new_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True, "sampling_seed": sampling.seed,
        }  # fmt: skip
        return Question("/generate", {"input_ids": [list(prompt)], "sampling_params": params})

    def continuation(self, answer: Any, prompt: Sequence[int]) -> list[int]:
        (each,) = _listed(answer, None, 1)
        ids = each.get("output_ids")
        if not isinstance(ids, list) or not ids:
            raise WrongAnswer("there are no output_ids in the answer")
        return [*map(int, ids)]


DIALECTS: tuple[Dialect, ...] = (VLLM(), SGLang())


def _scores(rows: Sequence[tuple[list[int], list[Any]]], text: Sequence[int], num_entries: int) -> Scores:
    """The K most likely entries of each position, and the one of the text's own token.

    Servers add the own token where it is not among the most likely ones. With all entries in order of probability, the
    first K are the same whether it was added or not.

    Args:
        rows: for each token of `text` the ids and log-probabilities of its position.
    """
    widest = max((len(ids) for ids, _ in rows), default=0)
    most = widest if num_entries == WHOLE else num_entries
    ids = np.full((len(rows), widest), -1, np.int32)
    log_probs = np.full((len(rows), widest), -np.inf, np.float32)
    for i, (tokens, values) in enumerate(rows):
        if len(tokens) < most or len(set(tokens)) < len(tokens):
            raise WrongAnswer(f"{most} different entries were asked for, and a position has {len(set(tokens))}")
        ids[i, : len(tokens)] = tokens
        log_probs[i, : len(tokens)] = [_number(value) for value in values]
    own = log_probs[ids == np.asarray(text, np.int32)[:, None]]
    if (log_probs > LARGEST_LOG_PROB).any():
        raise WrongAnswer(f"{log_probs.max():.4g} is no logarithm of a probability")
    if rows and (mass := np.exp(log_probs.astype(np.float64)).sum(-1).max()) > LARGEST_MASS:
        raise WrongAnswer(f"the probabilities of a position sum to {mass:.4g}")
    order = np.lexsort((ids, -log_probs))[:, :most]
    return Scores(np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1), own)


def _number(value: Any) -> float:
    """A log-probability; `WrongAnswer` for what is none. That of an impossible token may be minus infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise WrongAnswer(f"{value!r} is no log-probability")
    return max(value, LOWEST)


def _listed(answer: Any, name: str | None, number: int) -> list[Any]:
    """The list of objects of an answer, one for each text; a single one may stand alone."""
    found = answer.get(name) if name is not None and isinstance(answer, Mapping) else answer
    found = [found] if name is None and isinstance(found, Mapping) else found
    if not isinstance(found, list) or len(found) != number or not all(isinstance(each, Mapping) for each in found):
        length = len(found) if isinstance(found, list) else "none"
        raise WrongAnswer(f"{number} texts were sent, and the answer speaks of {length}")
    return found


def _same_length(positions: Any, text: Sequence[int]) -> None:
    if not isinstance(positions, list) or len(positions) != len(text):
        length = len(positions) if isinstance(positions, list) else "none"
        raise WrongAnswer(f"a text of {len(text)} tokens was sent, and the answer has {length} positions")
