"""Faults on demand: what a stub server does to an answer that would have been right.

A fault is `Fault(kind, ...)`. It hits the requests that it is meant for, of which `after` pass first, then every
`every`-th is hit, until `times` were (None: for ever).

| kind | the client sees |
|---|---|
| `slow` | the answer after `seconds` |
| `drip` | the answer in pieces, over `seconds`; the pauses between them are short |
| `status` | HTTP `status` with a JSON error; `retry_after`: seconds, or with `as_date` a date that many seconds ahead |
| `redirect` | HTTP `status` (307 unless given) to `location` |
| `cut` | no answer: the connection is closed |
| `cut_inside` | the head and half of the body, then the connection is closed |
| `half_json` | half of the JSON, well sent |
| `html` | a page with status 200 |
| `empty` | no body with status 200 |
| `value` | `value` as the log-probability of the actual token and of the most likely one at `position` ("nan", "inf") |
| `wrong_id` | another id at `position`: in `prompt_token_ids` and in place of the actual token |
| `short` | the last `positions` positions are missing |
| `no_field` | `prompt_logprobs` (`input_top_logprobs` of SGLang) is missing, as from a server that does not know it |
| `null_field` | the same field is null |
| `capped` | `keep` entries a position, however many were asked for |
| `duplicate` | one id twice at `position`, in place of the least likely one |
| `outside` | the generated ids are one outside of the vocabulary |
| `no_tokens` | no generated ids |
| `fewer_rows` | the last row's choice is missing |
| `reversed` | the choices from the last to the first, with the right `index`: a trap, no fault; SGLang has no index |
"""

import email.utils
import json
import time
from dataclasses import dataclass, field

ASKED = ("/v1/completions", "/generate")
KINDS_OF_ANSWER = (
    "value wrong_id short no_field null_field capped duplicate outside no_tokens fewer_rows reversed".split()
)
KINDS_OF_TRANSPORT = "slow drip status redirect cut cut_inside half_json html empty".split()


@dataclass
class Fault:
    """One fault; `hits` counts the requests that it has hit."""

    kind: str
    times: int | None = 1
    every: int = 1
    after: int = 0
    paths: tuple[str, ...] = ASKED
    seconds: float = 1.0
    status: int | None = None
    retry_after: float | None = None
    as_date: bool = False
    location: str = "/elsewhere"
    value: float = float("nan")
    position: int = 1
    positions: int = 1
    keep: int = 1
    hits: int = 0
    seen: int = field(default=0, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS_OF_ANSWER + KINDS_OF_TRANSPORT:
            raise ValueError(f"unknown fault {self.kind!r}: {KINDS_OF_TRANSPORT + KINDS_OF_ANSWER}")
        self.value = float(self.value)  # JSON brings "nan" as a text
        self.paths = tuple(self.paths)

    def is_due(self, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if path not in self.paths or (self.times is not None and self.hits >= self.times):
            return False
        self.seen += 1
        due = self.seen > self.after and (self.seen - self.after - 1) % self.every == self.every - 1
        self.hits += due
        return due

    def error(self) -> tuple[int, dict, dict]:
        """Status, headers and body of an error."""
        status = self.status or 500
        headers = {}
        if self.retry_after is not None:
            at = email.utils.formatdate(time.time() + self.retry_after, usegmt=True)
            headers["Retry-After"] = at if self.as_date else f"{self.retry_after:g}"
        detail = {"message": f"a fault on demand: {status}", "type": "InternalServerError", "param": None}
        return status, headers, {"error": detail | {"code": status}}

    def change(self, answer, vocab_size: int):
        """The answer with this fault; the answer may be changed in place."""
        if isinstance(answer, dict) and "choices" in answer:
            rows = _VLLMRows(answer)
        elif isinstance(answer, list) or "meta_info" in answer:
            rows = _SGLangRows(answer)
        else:
            return answer
        if self.kind == "fewer_rows":
            rows.rows.pop()
        elif self.kind == "reversed":
            rows.rows.reverse()
        else:
            for row in rows.rows:
                if self.kind in ("outside", "no_tokens"):
                    row[rows.tokens] = [vocab_size + 3] if self.kind == "outside" else []
                elif len(rows.positions(row)) > self.position:
                    getattr(rows, self.kind)(row, self, vocab_size)
        return answer


class _VLLMRows:
    tokens = "token_ids"

    def __init__(self, answer):
        self.rows = answer["choices"]

    def positions(self, row):
        return row["prompt_logprobs"] or []

    def value(self, row, fault, vocab_size):
        for place, entry in enumerate(row["prompt_logprobs"][fault.position].values()):
            if place == 0 or entry["rank"] == 1:
                entry["logprob"] = fault.value

    def wrong_id(self, row, fault, vocab_size):
        entries = row["prompt_logprobs"][fault.position]
        actual = next(iter(entries))
        other = str((int(actual) + 1) % vocab_size)
        swapped = {actual: other, other: actual}
        row["prompt_logprobs"][fault.position] = {swapped.get(id, id): entry for id, entry in entries.items()}
        if row["prompt_token_ids"] is not None:
            row["prompt_token_ids"] = list(row["prompt_token_ids"])
            row["prompt_token_ids"][fault.position] = int(other)

    def short(self, row, fault, vocab_size):
        del row["prompt_logprobs"][-fault.positions :]

    def no_field(self, row, fault, vocab_size):
        del row["prompt_logprobs"]

    def null_field(self, row, fault, vocab_size):
        row["prompt_logprobs"] = None

    def capped(self, row, fault, vocab_size):
        for place, entries in enumerate(row["prompt_logprobs"]):
            if entries is not None:
                kept = list(entries.items())
                top = sorted(kept, key=lambda item: item[1]["rank"])[: fault.keep]
                row["prompt_logprobs"][place] = dict([kept[0], *top])

    def duplicate(self, row, fault, vocab_size):
        entries = row["prompt_logprobs"][fault.position]
        key, entry = next(iter(entries.items()))
        entries.pop(list(entries)[-1])
        entries[int(key)] = entry  # as text the same key again


class _SGLangRows:
    tokens = "output_ids"

    def __init__(self, answer):
        self.rows = answer if isinstance(answer, list) else [answer]

    def positions(self, row):
        return row["meta_info"].get("input_token_logprobs", [])

    def value(self, row, fault, vocab_size):
        meta = row["meta_info"]
        meta["input_token_logprobs"][fault.position][0] = fault.value
        if "input_top_logprobs" in meta:
            meta["input_top_logprobs"][fault.position][0][0] = fault.value

    def wrong_id(self, row, fault, vocab_size):
        actual = row["meta_info"]["input_token_logprobs"][fault.position]
        actual[1] = (actual[1] + 1) % (vocab_size - 1)
        if "prompt_token_ids" in row:
            row["prompt_token_ids"] = list(row["prompt_token_ids"])
            row["prompt_token_ids"][fault.position] = actual[1]

    def short(self, row, fault, vocab_size):
        for name in ("input_token_logprobs", "input_top_logprobs"):
            del row["meta_info"].get(name, [])[-fault.positions :]

    def no_field(self, row, fault, vocab_size):
        row["meta_info"].pop("input_top_logprobs", None)

    def null_field(self, row, fault, vocab_size):
        row["meta_info"]["input_top_logprobs"] = None

    def capped(self, row, fault, vocab_size):
        for entries in row["meta_info"].get("input_top_logprobs", []):
            if entries is not None:
                del entries[fault.keep :]

    def duplicate(self, row, fault, vocab_size):
        entries = row["meta_info"]["input_top_logprobs"][fault.position]
        entries[-1] = list(entries[0])


def as_json(answer) -> bytes:
    """The answer's bytes, NaN and infinities as Python writes them."""
    return json.dumps(answer, separators=(",", ":")).encode()
