"""The checks of a server before anything is trained with it: that it is there, and answers as it should.

Shapes: T tokens of a text, K entries at a position.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from hf_distill.servers import Scores, WrongAnswer, within
from hf_distill.servers.client import (
    LARGEST_DISTANCE,
    Passing,
    Refused,
    Server,
    Watched,
    distance,
    public_address,
    read,
)
from hf_distill.servers.dialects import DIALECTS, WHOLE, Dialect

logger = logging.getLogger(__name__)

WANTED = 64  # entries, unless asked otherwise
# Caps of servers that do not tell theirs.
CAPS = (50, 40, 32, 20, 10, 8, 5, 4, 3, 2, 1)
PROBED = 256  # tokens whose text is compared
WIDEST = 64  # tokens of a text that a server is tried with
# So many of them may look different: what a piece of a character looks like alone, servers do not agree about.
LARGEST_DIFFERENCE = 0.05
UNKNOWN_HOST = ("getaddrinfo", "Name or service", "name resolution", "nodename", "No address associated")
# What servers say that allow fewer entries.
CAP = re.compile(r"(?:max(?:imum)?[- _]?(?:allowed|logprobs)|greater than)\D{0,40}(\d+)", re.IGNORECASE)
TOLD, WARNED = 1e-4, 1e-2  # nats between two answers about one text


class Served(NamedTuple):
    """A server that can teach."""

    server: Server
    num_entries: int  # K; -1 for the whole vocabulary
    max_length: int | None  # tokens of the longest text
    noise: float  # nats between two answers about one text
    version: str


class Expected(NamedTuple):
    """The needs of the student."""

    vocab_size: int  # the true vocabulary of the run
    text: tuple[int, ...]  # to be watched
    decode: Callable[[int], str]  # the text of a token


def roots(addresses: Sequence[str]) -> tuple[str, ...]:
    """The addresses without the `/v1` at their end; `ValueError` for what is none."""
    found = []
    for address in addresses:
        url = urlsplit(address)
        try:
            is_whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:  # a port that is no number
            is_whole = False
        if not is_whole or url.query or url.fragment:
            raise ValueError(
                f"{public_address(address)!r} is no address of a server: it looks like http://host:8000/v1"
            )
        found.append(address.rstrip("/").removesuffix("/v1").rstrip("/"))
    return tuple(found)


def greet(server: Server, served_name: str | None, num_entries: int | None, expected: Expected) -> Served:
    """Finds out what the servers at all addresses can do; they have to be copies of one model.

    Args:
        server ([`Server`]): with its addresses, key and timeout.
        served_name (`str`, *optional*): of several models that are served, the teacher.
        num_entries (`int`, *optional*): K; -1 for the whole vocabulary; by default as many as are allowed, up to 64.
        expected ([`Expected`]): what the student needs.

    Raises:
        `ValueError`: a server is not there, or cannot teach this student; what to do about it.
    """
    found: list[Served] = []
    for place, root in enumerate(server.addresses):
        alone = _alone(server, root)
        name, length = _model(alone, served_name)
        alone.model = name
        # It answers with one token more than it reads.
        room = WIDEST if length is None else min(WIDEST, length - 1)
        expected = expected._replace(text=expected.text[:room])
        asked = num_entries if not found or num_entries is not None else found[0].num_entries
        dialect, count = _dialect(alone, asked, expected)
        alone.dialect = dialect
        _compare_vocabulary(alone, expected, room)
        scores, noise = _twice(alone, count, expected)
        if not place:
            server.dialect, server.model = dialect, name
            server.watched = Watched(expected.text, scores, max(LARGEST_DISTANCE, 5 * noise))
        elif (name, type(dialect), count) != (server.model, type(server.dialect), found[0].num_entries):
            raise ValueError(
                f"{public_address(root)} serves {name!r} ({dialect.name}, {count} entries), and "
                f"{public_address(server.addresses[0])} {server.model!r} ({server.dialect.name}, "
                f"{found[0].num_entries} entries): several addresses have to be copies of one server"
            )
        elif (far := distance(scores, server.watched.scores)) > server.watched.allowed:
            raise ValueError(
                f"{public_address(root)} and {public_address(server.addresses[0])} serve different models: "
                f"probabilities of one text are {far:.2g} apart"
            )
        found.append(Served(server, count, length, noise, f"{dialect.name} {_version(alone)}".strip()))
    lengths = [each.max_length for each in found if each.max_length is not None]
    noise = max(each.noise for each in found)
    return found[0]._replace(max_length=min(lengths, default=None), noise=noise)


def name_of_model(server: Server, served_name: str | None) -> str:
    """The name under which all addresses serve a model; `ValueError` if one does not answer, or serves another."""
    names = [_model(_alone(server, root), served_name)[0] for root in server.addresses]
    if len(set(names)) > 1:
        raise ValueError(f"several addresses have to be copies of one server, and they serve {', '.join(names)}")
    return names[0]


def start_line(model: str, num_entries: int | str) -> str:
    """The command that starts a server which can teach."""
    return f"vllm serve {model} --max-logprobs {num_entries}"


# ------------------------------------------------------------------------------------------------------------- steps


def _alone(server: Server, root: str) -> Server:
    """A server at one address, of which nothing is known yet."""
    return Server((root,), server.dialect, "", server.key_variable, server.timeout)


def _model(server: Server, served_name: str | None) -> tuple[str, int | None]:
    """The name of the model that is served, and the tokens of its longest text, where that is told."""
    where = public_address(server.addresses[0])
    try:
        answer = server.get("/v1/models")
    except (Passing, Refused) as error:
        raise ValueError(_unreachable(where, server, error)) from error
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not models or not all(isinstance(m, dict) and "id" in m for m in models):
        raise ValueError(f"{where}/v1/models names no model: is it a server of vLLM or SGLang? {_remedy()}")
    by_name = {str(each["id"]): each for each in models}
    if served_name is None and len(by_name) > 1:
        raise ValueError(f"{where} serves {', '.join(by_name)}: name the teacher, teacher_served_name")
    name = next(iter(by_name)) if served_name is None else served_name
    if name not in by_name:
        raise ValueError(f"{where} serves {', '.join(by_name)}, and teacher_served_name is {name!r}")
    length = by_name[name].get("max_model_len")
    return name, length if isinstance(length, int) else None


def _unreachable(where: str, server: Server, error: Passing | Refused) -> str:
    """Which part of an address is wrong, in words."""
    url, text = urlsplit(where), str(error)
    status = error.status if isinstance(error, Refused) else None
    if "SSL" in text or "CERTIFICATE" in text.upper():
        return f"{where}: the secure connection fails ({text}): is it http, or is its certificate one of your own?"
    if any(part in text for part in UNKNOWN_HOST):
        return f"there is no host {url.hostname!r} ({text})"
    if "Connect" in text:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        return f"nothing answers at port {port} of {url.hostname} ({text}): is the server running? {_remedy()}"
    if status in (401, 403):
        key = f"the one in {server.key_variable} is not taken" if server.key_variable else "there is none: name the "
        key += "" if server.key_variable else "environment variable that holds it, teacher_key_variable"
        return f"{where} wants a key, and {key} ({text})"
    if status in (404, 405):
        return f"{where}/v1/models is not there ({text}): the address ends before or after /v1, as http://host:8000/v1"
    return f"{where} does not answer as a server of vLLM or SGLang does: {text}"


def _dialect(server: Server, num_entries: int | None, expected: Expected) -> tuple[Dialect, int]:
    """The dialect that a server understands, and K: the one asked for, or the most that it allows."""
    problems = []
    for dialect in DIALECTS:
        wanted = WANTED if num_entries is None else num_entries
        if not 0 < wanted < expected.vocab_size:
            wanted = WHOLE if dialect.has_whole else expected.vocab_size
        for count in (wanted, *(cap for cap in CAPS if cap < wanted and num_entries is None)):
            try:
                answer = server.ask_once(dialect.scoring(server.model, [expected.text], count))
                (scores,) = read(dialect.scores, answer, [expected.text], count, [0])
            except Refused as error:
                problems.append(f"{dialect.name}: {error}")
                if error.status not in (400, 422):
                    break
                if told := _told_cap(str(error)):
                    if num_entries is not None:
                        raise ValueError(_too_many(server, dialect, num_entries, told, expected)) from error
                    if told < count:
                        return _dialect(server, told, expected)
                continue
            except (Passing, WrongAnswer) as error:
                problems.append(f"{dialect.name}: {error}")
                break
            if count >= expected.vocab_size and (within(scores, expected.vocab_size).ids < 0).any():
                problems.append(f"{dialect.name}: its head is padded, so that it does not tell all tokens")
                break
            if count == WHOLE and scores.ids.shape[1] < expected.vocab_size:
                problems.append(f"{dialect.name}: {scores.ids.shape[1]} entries, and {expected.vocab_size} tokens")
                break
            return dialect, count
    where = public_address(server.addresses[0])
    raise ValueError(
        f"{where} does not give log-probabilities of a prompt, which a teacher has to ({'; '.join(problems)}). "
        f"{_remedy(server.model, num_entries)}"
    )


def _told_cap(message: str) -> int | None:
    """The largest K in the message of a server that allows fewer entries."""
    found = CAP.search(message)
    return int(found[1]) if found and "logprobs" in message else None


def _too_many(server: Server, dialect: Dialect, asked: int, cap: int, expected: Expected) -> str:
    said = "the whole vocabulary" if asked == WHOLE else str(asked)
    return (
        f"teacher_logprobs asks for {said}, and {public_address(server.addresses[0])} gives {cap} at most: take "
        f"teacher_logprobs={cap}, or start it with {dialect.most} {asked}: {start_line(server.model, asked)}"
    )


def _compare_vocabulary(server: Server, expected: Expected, room: int) -> None:
    """Raises `ValueError` if the server's tokens are not the student's: their texts, and the highest one."""
    where, last = public_address(server.addresses[0]), expected.vocab_size - 1
    ids = np.unique(np.linspace(0, last, min(PROBED, expected.vocab_size)).round().astype(int)).tolist()
    own = {token: expected.decode(token) for token in ids}
    parts = [ids[i : i + room] for i in range(0, len(ids), room)]
    parts = [part if len(part) > 1 else [*part, *part] for part in parts]
    theirs: dict[int, str] = {}
    for part in parts:
        try:
            answer = server.ask_once(server.dialect.scoring(server.model, [part], 1))
            read(server.dialect.scores, answer, [part], 1, [0])
        except Refused as error:
            raise ValueError(
                f"{where} refuses tokens {part[0]} to {part[-1]}, which the student knows: its vocabulary is another "
                f"({error})"
            ) from error
        except (Passing, WrongAnswer) as error:
            raise ValueError(f"{where} gives no answer about the student's tokens: {error}") from error
        theirs |= read(server.dialect.texts, answer)
    compared = [token for token in ids if token in theirs and _plain(own[token]) and _plain(theirs[token])]
    if not compared:
        logger.warning("%s tells no texts of tokens, so it is not known whether its tokenizer is the student's", where)
    other = [token for token in compared if _plain(own[token]) != _plain(theirs[token])]
    if len(other) > LARGEST_DIFFERENCE * len(compared):
        token = other[0]
        raise ValueError(
            f"{where} has another tokenizer than the student: {len(other)} of {len(compared)} tokens differ, the first "
            f"is {token}, {own[token]!r} for the student and {theirs[token]!r} for the server"
        )


def _plain(text: str) -> str:
    """The text of a token without what servers write differently; empty where it is a piece of a character."""
    text = text.replace("\u2581", " ").replace("\u0120", " ").strip()
    return "" if "\ufffd" in text else text


def _twice(server: Server, num_entries: int, expected: Expected) -> tuple[Scores, float]:
    """The scores of the watched text, and nats between two answers, the second one beside another text."""

    def ask(texts: Sequence[Sequence[int]]) -> list[Scores]:
        answer = server.ask_once(server.dialect.scoring(server.model, texts, num_entries))
        return read(server.dialect.scores, answer, texts, num_entries, [0] * len(texts))

    try:
        (first,), (_, second) = ask([expected.text]), ask([expected.text[::-1], expected.text])
    except (Passing, Refused, WrongAnswer) as error:
        raise ValueError(f"{public_address(server.addresses[0])} fails at a second text: {error}") from error
    return first, float(np.abs(first.own - second.own).max())


def _version(server: Server) -> str:
    """The version of the server's software, where it tells one."""
    for path in ("/version", "/get_server_info"):
        try:
            answer: Any = server.get(path)
        except (Passing, Refused):
            continue
        if isinstance(answer, dict) and isinstance(answer.get("version"), str):
            return answer["version"]
    return ""


def _remedy(model: str = "MODEL", num_entries: int | None = None) -> str:
    return f"Start one with: {start_line(model, WANTED if num_entries is None else num_entries)}"
