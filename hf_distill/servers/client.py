"""The client of a server: requests that are tried again, in several at a time, and an answer that is looked at.

A [`Server`] can be pickled and forked: connections are opened in the process that uses them, and the key is read from
the environment there.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import httpx2 as httpx
import numpy as np
import tenacity

from hf_distill.servers import Scores, TeacherAway, WrongAnswer
from hf_distill.servers.dialects import Dialect, Question, Sampling

ENTRY_BYTES = 69  # of JSON, measured with vLLM
REQUEST_BYTES = 16 * 2**20  # of an answer, about; longer batches are asked for in several requests
IN_FLIGHT = 8  # requests of one process at one time
CONNECTING = 10.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0  # seconds between two tries
GROWING = tenacity.wait_exponential(FIRST_PAUSE, LONGEST_PAUSE) + tenacity.wait_random(0, FIRST_PAUSE)
# What passes: the server is busy, starting, or behind a proxy that does not reach it now.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
# The largest distance between two answers about the watched text, beside the one that was measured at the start.
LARGEST_DISTANCE = 0.02
COMPARED = 32  # entries of a position
_LOCK = threading.Lock()  # of the counts, which several threads add to


class Passing(ConnectionError):
    """A failure that may be gone at the next try."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause  # seconds that the server asks for


class Refused(ConnectionError):
    """The server answers that it will not: another try would not help."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status, self.reason = status, reason


class Watched(NamedTuple):
    """A text whose scores are known: its answer comes with every other one, so that another model is noticed."""

    text: tuple[int, ...]
    scores: Scores
    allowed: float  # distance


@dataclass
class Counts:
    """Sums over the requests since they were taken last."""

    requests: int = 0
    retries: int = 0
    bytes: int = 0  # of answers
    seconds: float = 0.0  # of waiting for answers
    positions: int = 0  # tokens that were scored

    def add(self, **more: float) -> None:
        with _LOCK:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)


@dataclass
class Server:
    """One model at one address or at several.

    Args:
        addresses: roots, as `http://host:8000`, without the `/v1`.
        dialect ([`Dialect`]): its words.
        model (`str`): the name that it is served under.
        key_variable (`str`, *optional*): the environment variable that holds the key.
        timeout (`float`): seconds that requests are tried for; one answer may take a third of them.
        watched ([`Watched`], *optional*): a text that is asked about beside every other.

    Raises:
        [`TeacherAway`]: from `score` and `generate`, when the time is over, or for what another try would not mend.
    """

    addresses: tuple[str, ...] = field(repr=False)  # with passwords, maybe
    dialect: Dialect
    model: str
    key_variable: str | None = None
    timeout: float = 600.0
    watched: Watched | None = None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._process: int | None = None
        self._turn = 0  # of the addresses; processes begin with different ones

    def __getstate__(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "counts": Counts(),
            "_process": None,
            "_turn": 0,
        }

    # ------------------------------------------------------------------------------------------------- questions

    def score(
        self, texts: Sequence[Sequence[int]], num_entries: int, starts: Sequence[int] | None = None
    ) -> list[Scores]:
        """The scores of some texts.

        Args:
            texts: token ids, two or more of each.
            num_entries (`int`): K; -1 for the whole vocabulary.
            starts (*optional*): for each text the first place i whose next token is asked about; the Scores have
                positions i to T - 2 then. Servers compute all of them.
        """
        starts = [0] * len(texts) if starts is None else starts
        watched = self.watched
        # The watched text is asked about where the others are, in the same request.
        extra = [] if watched is None else [watched.text]
        parts = _divided([len(text) for text in texts], num_entries, len(self.addresses))

        def ask(part: Sequence[int], place: int) -> list[Scores]:
            asked = [*(texts[i] for i in part), *extra]
            first = [*(starts[i] for i in part), *(0 for _ in extra)]
            question = self.dialect.scoring(self.model, asked, num_entries)
            answer = self._post(question, place)
            self.counts.add(positions=sum(map(len, asked)))
            found = read(self.dialect.scores, answer, asked, num_entries, first)
            if watched is not None and (far := distance(found.pop(), watched.scores)) > watched.allowed:
                raise WrongAnswer(
                    f"another model answers now: about a text that was asked before its probabilities are {far:.2g} "
                    f"away from the first ones, and {watched.allowed:.2g} could be rounding"
                )
            return found

        found: list[Any] = [None] * len(texts)
        for part, scores in zip(parts, self._at_once(ask, parts), strict=True):
            for i, each in zip(part, scores, strict=True):
                found[i] = each
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int] | int,
        temperature: float,
        seeds: Sequence[int],
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        vocab_size: int | None = None,
    ) -> list[list[int]]:
        """A continuation of each prompt, with the token that ended it.

        Args:
            max_tokens: the most tokens, of all or of each.
            temperature (`float`): 0 is greedy.
            seeds: of each prompt. The server's own random numbers follow from it.
            stop_ids: tokens that end a text; no others do.
            vocab_size (`int`, *optional*): ids from here on do not count. One that is drawn is drawn again, which
                leaves the distribution over the others.
        """
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)

        def ask(i: int, place: int) -> list[int]:
            written: list[int] = []
            for again in range(64):
                sampling = Sampling(
                    limits[i] - len(written), temperature, top_p, _seed(seeds[i], again), tuple(stop_ids)
                )
                prompt = [*prompts[i], *written]
                answer = self._post(self.dialect.generating(self.model, prompt, sampling), place)
                more = read(self.dialect.continuation, answer, prompt)
                strange = next((j for j, token in enumerate(more) if vocab_size and token >= vocab_size), len(more))
                written += more[:strange]
                # Not every server ends a text where it was told to.
                end = next((j + 1 for j, token in enumerate(written) if token in sampling.stop_ids), None)
                if end is not None or strange == len(more):
                    return written[:end]
            raise WrongAnswer(f"the server writes tokens from {vocab_size} on, which the student does not know")

        return self._at_once(ask, range(len(prompts)))

    def take_counts(self) -> Counts:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counts()
        return counts

    # ---------------------------------------------------------------------------------------------- the network

    def get(self, path: str, place: int = 0) -> Any:
        """The answer of a path, as JSON. One try."""
        return self._sent("GET", path, None, place, self.timeout)

    def ask_once(self, question: Question, place: int = 0) -> Any:
        """The answer to a question. One try."""
        return self._sent("POST", question.path, question.body, place, self.timeout)

    def _post(self, question: Question, place: int) -> Any:
        """The answer to a question, tried until the time is over."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Passing),
            stop=tenacity.stop_before_delay(self.timeout),
            wait=partial(_pause, num_addresses=len(self.addresses), limit=self.timeout),
            before_sleep=lambda state: self.counts.add(retries=1),
            reraise=True,
        )
        start = time.monotonic()

        def once() -> Any:
            left = self.timeout - (time.monotonic() - start)
            # Another address takes over where one is away.
            number = place + retrying.statistics.get("attempt_number", 1) - 1
            return self._sent("POST", question.path, question.body, number, max(min(left, self.timeout / 3), 1.0))

        try:
            return retrying(once)
        except Passing as error:
            seconds = time.monotonic() - start
            raise TeacherAway(f"{self._where} has not answered for {seconds:.0f} s: {error}") from error
        except Refused as error:
            raise TeacherAway(f"{self._where} refuses a request: {error}") from error

    def _sent(self, method: str, path: str, body: Any, place: int, timeout: float) -> Any:
        client, root = self._open(), self.addresses[place % len(self.addresses)]
        user = urlsplit(root)
        auth = (unquote(user.username), unquote(user.password or "")) if user.username else httpx.USE_CLIENT_DEFAULT
        self.counts.add(requests=1)
        try:
            end = time.monotonic() + timeout
            limits = httpx.Timeout(timeout, connect=min(CONNECTING, timeout))
            with client.stream(method, public_address(root) + path, json=body, auth=auth, timeout=limits) as parts:
                answer = _whole(parts, end)
        except httpx.TransportError as error:
            raise Passing(_reason(error)) from error
        except httpx.HTTPError as error:
            raise Refused(0, str(error)) from error
        self.counts.add(bytes=len(answer.content))
        if answer.status_code in PASSING:
            raise Passing(f"HTTP {answer.status_code}: {_said(answer)}", _retry_after(answer))
        if not answer.is_success:
            raise Refused(answer.status_code, _said(answer))
        try:
            return json.loads(answer.content)
        except ValueError as error:
            raise Passing(f"an answer that is no JSON: {answer.text[:80]!r}") from error

    def _open(self) -> httpx.Client:
        """This process's client."""
        if self._process != os.getpid():
            headers = {} if (key := self._key()) is None else {"Authorization": f"Bearer {key}"}
            self._client = httpx.Client(headers=headers, limits=httpx.Limits(max_connections=IN_FLIGHT))
            self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="teacher")
            self._process = self._turn = os.getpid()
        return self._client

    def _key(self) -> str | None:
        return None if self.key_variable is None else os.environ.get(self.key_variable)

    @property
    def _where(self) -> str:
        return f"the teacher at {' and '.join(map(public_address, self.addresses))}"

    def _at_once(self, ask: Callable[[Any, int], Any], parts: Sequence[Any]) -> list[Any]:
        """The results of `ask` for each part and its number, several at a time."""
        start = time.perf_counter()
        self._open()
        places = range(self._turn, self._turn + len(parts))
        self._turn += len(parts)
        try:
            if len(parts) < 2:
                return [ask(part, place) for place, part in zip(places, parts, strict=True)]
            return list(self._threads.map(ask, parts, places))
        except WrongAnswer as error:
            raise TeacherAway(f"{self._where} gives a wrong answer: {error}") from error
        finally:
            self.counts.add(seconds=time.perf_counter() - start)


def distance(scores: Scores, others: Scores) -> float:
    """The total variation between two answers about one text, over the likeliest tokens of the first; the mean.

    What the second one does not have among its entries is no more likely for it than its last entry.
    """
    ids, probs = scores.ids[:, :COMPARED], np.exp(scores.log_probs[:, :COMPARED], dtype=np.float64)  # (n, k)
    found = np.exp(others.log_probs, dtype=np.float64)  # (n, K)
    is_same = ids[:, :, None] == others.ids[:, None, :]  # (n, k, K)
    theirs = np.where(is_same.any(-1), (is_same * found[:, None]).sum(-1), np.minimum(probs, found[:, -1:]))
    return float(np.abs(probs - theirs).sum(-1).mean() / 2)


def public_address(address: str) -> str:
    """An address without user and password."""
    scheme, colon, rest = address.partition("://")
    return f"{scheme}{colon}{rest.rpartition('@')[2]}"


def _divided(lengths: Sequence[int], num_entries: int, least: int) -> list[list[int]]:
    """The numbers of texts in requests: `least` or more, if there are so many texts, of about `REQUEST_BYTES` at most.

    Of the whole vocabulary, whose size is not known here, each text is a request.
    """
    limit = REQUEST_BYTES / (ENTRY_BYTES * num_entries) if num_entries > 0 else 1
    count = min(len(lengths), max(least, math.ceil(sum(lengths) / limit)))
    return [list(range(i, len(lengths), count)) for i in range(count)]


def _seed(seed: int, again: int) -> int:
    """The seed itself, and another one for each repetition."""
    return seed if not again else int(np.random.SeedSequence((seed, again)).generate_state(1)[0] >> 1)


def read(function: Callable[..., Any], *args: Any) -> Any:
    """An answer as a dialect reads it; `WrongAnswer` for one of another form."""
    try:
        return function(*args)
    except WrongAnswer:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise WrongAnswer(f"an answer of another form ({type(error).__name__}: {error})") from error


def _pause(state: tenacity.RetryCallState, num_addresses: int, limit: float) -> float:
    """Growing, with jitter; at least what the server asks for, if that leaves time, and all addresses were tried."""
    assert state.outcome is not None
    assert state.seconds_since_start is not None
    error: Any = state.outcome.exception()
    asked = error.pause if state.attempt_number % num_addresses == 0 else 0.0
    return max(GROWING(state), min(asked, 0.9 * (limit - state.seconds_since_start)))


def _whole(parts: httpx.Response, end: float) -> httpx.Response:
    """An answer that has come whole before `end`. The limits of httpx are those of a silence, not of a slow answer."""
    content = bytearray()
    for part in parts.iter_bytes():
        content += part
        if time.monotonic() > end:
            raise httpx.ReadTimeout(f"the answer had not ended in time, after {len(content):,} bytes")
    kept = {name: parts.headers[name] for name in ("retry-after", "content-type") if name in parts.headers}
    return httpx.Response(parts.status_code, headers=kept, content=bytes(content))


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number or a date."""
    said = answer.headers.get("retry-after", "")
    try:
        return max(float(said), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _said(answer: httpx.Response) -> str:
    """The message of an error, of a server of either kind."""
    try:
        found = answer.json()
    except ValueError:
        return answer.text[:200] or answer.reason_phrase
    while isinstance(found, Mapping):
        found = next((found[name] for name in ("error", "message", "detail") if name in found), str(found))
    return str(found)[:500]


def _reason(error: Exception) -> str:
    """The reason of a failed connection, for people."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
