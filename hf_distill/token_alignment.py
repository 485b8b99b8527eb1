"""Alignment of two tokenisations of one text, and the tokens that two vocabularies share.

A *piece* is the content of a token: `bytes` for text, a `str` for a marker (bos, eos, `<|im_start|>`), which has no
text. All tokenizers agree on bytes: `Ġthe` of GPT-2 and `▁the` of Llama are both `b" the"`, and an emoji may be cut at
any byte. A *group* is a shortest run of student tokens and of teacher tokens that cover the same text.

Shapes: K names, Vs and Vt the vocabularies.
"""

import itertools
import json
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Piece = bytes | str
Run = tuple[int, int, int]  # a stretch of text that both sides have: its start in each text, its length in bytes

WHITESPACE = b" \t\n\r\x0b\x0c"
# After different text, the texts count as equal again once this many bytes (or all remaining ones) are equal.
RESUMING_BYTES = 8
# Names of tokens without a shared name. UNNAMED: no shared token is a beginning of its text. OUTSIDE: never compared.
UNNAMED, OUTSIDE = -1, -2


class Group(NamedTuple):
    """Tokens that cover the same text. A side without that text, or without that marker, is empty."""

    student: range
    teacher: range
    # True if both sides are exactly the same bytes, or the same marker. Otherwise white space or case differ (the space
    # that SentencePiece puts before a text), so the next-token distributions belong to different texts.
    comparable: bool


class SharedTokens(NamedTuple):
    """The common tokens of two vocabularies, as int64 tensors. A name is a piece that is a token of both."""

    student_ids: Tensor  # (K,) the student's token for each name
    teacher_ids: Tensor  # (K,)
    # The name of each token: its own, else the longest name that it begins with, else UNNAMED. OUTSIDE for markers that
    # only one side has and for ids without a token.
    student_names: Tensor  # (Vs,)
    teacher_names: Tensor  # (Vt,)


def vocabulary_pieces(tokenizer: Any) -> list[Piece | None]:
    """The piece of every token id; None for ids without a token.

    Byte-level, SentencePiece and WordPiece vocabularies are supported. A WordPiece word counts as beginning with a
    space. Special tokens are markers: "bos" and "eos" by their role (a token with both roles is "eos"), others by
    their content.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): read through `backend_tokenizer`, `get_vocab()`, `added_tokens_decoder`,
            `all_special_ids`, `bos_token_id` and `eos_token_id`.

    Raises:
        `ValueError`: the text of single tokens cannot be derived from the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the text of single tokens cannot be read from a {type(tokenizer).__name__}; load the fast tokenizer "
            "(AutoTokenizer with use_fast=True)"
        )
    spell, spell_added = _spelling(backend.decoder)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    pieces: list[Piece | None] = [None] * (max([*vocabulary.values(), *added]) + 1)
    for token, index in vocabulary.items():
        pieces[index] = spell(token)
    special = set(tokenizer.all_special_ids)
    for index, token in added.items():
        pieces[index] = token.content if token.special or index in special else spell_added(token.content)
    for role in ("bos", "eos"):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            pieces[index] = role
    return pieces


def shared_tokens(student_pieces: Sequence[Piece | None], teacher_pieces: Sequence[Piece | None]) -> SharedTokens:
    """The tokens that mean the same on both sides, and names for all other tokens, from both `vocabulary_pieces`.

    A token that only one side has gets the name of the longest shared token that it begins with. If the student has no
    `grandmother` but has `gr`, the teacher's probability of `grandmother` counts for `gr`. This moves no probability
    between texts. With exact matches alone, that probability would have no counterpart.
    """
    sides = student_pieces, teacher_pieces
    # If several ids have one piece, the last counts: SentencePiece has the byte `<0x41>` before the letter `A` itself.
    ids = [{piece: i for i, piece in enumerate(pieces) if piece is not None} for pieces in sides]
    names = {piece: k for k, piece in enumerate(piece for piece in ids[0] if piece in ids[1] and piece != b"")}

    def name(piece: Piece | None) -> int:
        if not isinstance(piece, bytes):
            return names.get(piece, OUTSIDE) if piece is not None else OUTSIDE
        beginnings = (names.get(piece[:length]) for length in range(len(piece), 0, -1))
        return next((found for found in beginnings if found is not None), UNNAMED)

    return SharedTokens(
        *(torch.tensor([side[piece] for piece in names], dtype=torch.long) for side in ids),
        *(torch.tensor([name(piece) for piece in pieces], dtype=torch.long) for pieces in sides),
    )


def align(
    student_pieces: Sequence[Piece], teacher_pieces: Sequence[Piece], contents: Sequence[str] | None = None
) -> list[Group]:
    """The groups of two tokenisations, in order. Every token is in exactly one group. Takes linear time.

    Different white space is skipped. After any other difference (two chat templates, a word that one tokenizer does
    not know), each token is a group of its own until `RESUMING_BYTES` bytes are equal again. Equal markers at the same
    position in the text form a group.

    Args:
        student_pieces: the entry in `vocabulary_pieces` of each token, without padding.
        teacher_pieces: the same of the teacher's tokens.
        contents (list of `str`, *optional*):
            The contents of all messages, in order, if the two texts come from different templates. Only these contents
            are aligned then, however short they are. The last occurrence of a content counts, because templates put
            names before contents.
    """
    sides = student_pieces, teacher_pieces
    gaps = set()
    if contents is None:
        runs = list(_equal_runs(_text(student_pieces), _text(teacher_pieces)))
    else:
        found = _runs_of_contents(student_pieces, teacher_pieces, contents)
        runs = [run for part in found if part is not None for run in part]
        # The numbers of shared bytes after which a content is missing. A marker there may stand before or after it.
        before = itertools.accumulate((sum(run[2] for run in part or ()) for part in found), initial=0)
        gaps = {size for size, part in zip(before, found, strict=False) if part is None}
    # For each token: the number of shared bytes up to its end.
    student, teacher = (_shared_bytes(side, [(run[k], run[2]) for run in runs]) for k, side in enumerate(sides))
    groups: list[Group] = []
    i = j = done = 0
    while i < len(student) or j < len(teacher):
        start_i, start_j = i, j
        while i < len(student) and student[i] == done:
            i += 1
        while j < len(teacher) and teacher[j] == done:
            j += 1
        if i > start_i or j > start_j:
            pair = _leave_alone if done in gaps else _pair_markers
            groups += pair(*sides, range(start_i, i), range(start_j, j))
        if i == len(student):
            continue  # Both sides are past all shared bytes.
        start_i, start_j = i, j
        i, j = i + 1, j + 1
        while student[i - 1] != teacher[j - 1]:
            if student[i - 1] < teacher[j - 1]:
                i += 1
            else:
                j += 1
        done = student[i - 1]
        groups += _text_groups(*sides, range(start_i, i), range(start_j, j))
    return groups


def group_numbers(
    groups: Sequence[Group], student_counts: Sequence[bool], teacher_counts: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """The group number of each student token and of each teacher token; -1 for tokens that are not compared.

    Args:
        groups: the result of `align`.
        student_counts (sequence of `bool`):
            True for tokens that count: they have a label, and a position predicts them (none predicts the first token
            of a sequence). A group with a token that does not count is left out.
        teacher_counts (sequence of `bool`): the same of the teacher's tokens.
    """
    student, teacher = [-1] * len(student_counts), [-1] * len(teacher_counts)
    for number, group in enumerate(groups):
        if (
            group.comparable
            and all(student_counts[i] for i in group.student)
            and all(teacher_counts[j] for j in group.teacher)
        ):
            student[group.student.start : group.student.stop] = [number] * len(group.student)
            teacher[group.teacher.start : group.teacher.stop] = [number] * len(group.teacher)
    return student, teacher


def exact_fraction(groups: Sequence[Group]) -> float:
    """The share of the student's tokens that face exactly one teacher token with exactly the same bytes."""
    exact = sum(group.comparable and len(group.student) == len(group.teacher) == 1 for group in groups)
    return exact / max(sum(len(group.student) for group in groups), 1)


def _text(pieces: Sequence[Piece]) -> bytes:
    return b"".join(piece for piece in pieces if isinstance(piece, bytes))


def _squeezed(text: bytes) -> bytes:
    """The text without white space, in lower case (ASCII)."""
    return text.translate(None, WHITESPACE).lower()


def _equal_runs(student: bytes, teacher: bytes) -> Iterator[Run]:
    """The stretches of text that both sides have, ignoring case."""
    student, teacher = student.lower(), teacher.lower()
    # If the texts begin with different numbers of spaces, one side has added the first ones.
    before = [len(text) - len(text.lstrip(WHITESPACE)) for text in (student, teacher)]
    i, j = max(0, before[0] - before[1]), max(0, before[1] - before[0])
    while i < len(student) and j < len(teacher):
        if length := _equal_length(student, teacher, i, j):
            yield i, j, length
            i, j = i + length, j + length
        elif student[i] in WHITESPACE:
            i += 1
        elif teacher[j] in WHITESPACE:
            j += 1
        else:
            i, j = _next_equal(student, teacher, i, j)


def _equal_length(student: bytes, teacher: bytes, i: int, j: int) -> int:
    """The number of equal bytes from `i` and `j` on."""

    def equal(length: int, step: int) -> bool:
        found = student[i + length : i + length + step]
        return len(found) == step and found == teacher[j + length : j + length + step]

    length, step = 0, 1
    while equal(length, step):
        length, step = length + step, 2 * step
    while step := step // 2:
        length += step * equal(length, step)
    return length


def _next_equal(student: bytes, teacher: bytes, i: int, j: int) -> tuple[int, int]:
    """The nearest offsets from `i` and `j` on where `RESUMING_BYTES` bytes, or all remaining bytes, are equal."""
    window = 64
    while True:
        places = range(j, min(j + window, len(teacher)) + 1)
        last = {teacher[y : y + RESUMING_BYTES]: y for y in reversed(places)}  # the nearest of equal ones
        found = []
        for x in range(i, min(i + window, len(student)) + 1):
            y = last.get(student[x : x + RESUMING_BYTES])
            if y is not None:
                found.append((x + y, x, y))
        if found:
            return min(found)[1:]
        window *= 2  # Ends at the latest at the ends of both texts, which are equal.


def _runs_of_contents(
    student_pieces: Sequence[Piece], teacher_pieces: Sequence[Piece], contents: Sequence[str]
) -> list[list[Run] | None]:
    """The stretches that both sides have inside each of `contents`; None for a content that a side lacks.

    The search starts at the end.
    """
    sides = student_pieces, teacher_pieces
    texts = [_text(side) for side in sides]
    inks = [text.translate(None, WHITESPACE)[::-1] for text in texts]  # templates strip and add white space
    places = [[i for i, byte in enumerate(text) if byte not in WHITESPACE] for text in texts]
    ends = [{len(ink) - end for end in _ends(side, WHITESPACE)} for side, ink in zip(sides, inks, strict=True)]
    read: list[int] = [0, 0]
    runs: list[list[Run] | None] = []
    for content in reversed(contents):
        wanted = content.encode().translate(None, WHITESPACE)[::-1]
        found = [_find_tokens(*side) for side in zip(inks, (wanted, wanted), read, ends, strict=True)]
        if not wanted or -1 in found:
            runs.append(None if wanted else [])
            continue
        read = [start + len(wanted) for start in found]
        (i, end_i), (j, end_j) = (
            (place[-end], place[-1 - start] + 1) for place, start, end in zip(places, found, read, strict=True)
        )
        inside = _equal_runs(texts[0][i:end_i], texts[1][j:end_j])
        runs.append([(i + x, j + y, length) for x, y, length in inside])
    return runs[::-1]


def _find_tokens(text: bytes, wanted: bytes, start: int, ends: set[int]) -> int:
    """The next offset of `wanted` between two `ends` of tokens (not the `a` inside `assistant`), or -1."""
    start = text.find(wanted, start)
    while start != -1 and not {start, start + len(wanted)} <= ends:
        start = text.find(wanted, start + 1)
    return start


def _ends(pieces: Sequence[Piece], ignored: bytes = b"") -> list[int]:
    """The offsets where tokens begin and end, in bytes of the text without those in `ignored`."""
    lengths = (len(piece.translate(None, ignored)) if isinstance(piece, bytes) else 0 for piece in pieces)
    return list(itertools.accumulate(lengths, initial=0))


def _shared_bytes(pieces: Sequence[Piece], runs: Sequence[tuple[int, int]]) -> list[int]:
    """For each piece, the number of bytes of `runs` (start, length) before its end."""
    counts, before, k = [], 0, 0
    for end in _ends(pieces)[1:]:
        while k < len(runs) and sum(runs[k]) <= end:
            before, k = before + runs[k][1], k + 1
        counts.append(before + (max(0, end - runs[k][0]) if k < len(runs) else 0))
    return counts


def _pair_markers(
    student_pieces: Sequence[Piece], teacher_pieces: Sequence[Piece], student: range, teacher: range
) -> Iterator[Group]:
    """Groups of tokens without shared text: equal markers in pairs, in order; every other token alone."""
    places = defaultdict(deque)
    for j in teacher:
        places[teacher_pieces[j]].append(j)
    next_j = teacher.start
    for i in student:
        same = places[student_pieces[i]] if isinstance(student_pieces[i], str) else deque()
        while same and same[0] < next_j:
            same.popleft()
        if same:
            yield from (Group(range(i, i), range(j, j + 1), False) for j in range(next_j, same[0]))
            next_j = same[0] + 1
            yield Group(range(i, i + 1), range(same[0], next_j), True)
        else:
            yield Group(range(i, i + 1), range(next_j, next_j), False)
    yield from (Group(range(student.stop, student.stop), range(j, j + 1), False) for j in range(next_j, teacher.stop))


def _leave_alone(_: Any, __: Any, student: range, teacher: range) -> Iterator[Group]:
    """One group per token, with an empty other side."""
    yield from (Group(range(i, i + 1), range(teacher.start, teacher.start), False) for i in student)
    yield from (Group(range(student.stop, student.stop), range(j, j + 1), False) for j in teacher)


def _text_groups(
    student_pieces: Sequence[Piece], teacher_pieces: Sequence[Piece], student: range, teacher: range
) -> list[Group]:
    """One group if both sides have the same text, else one group per side."""
    pieces = student_pieces[student.start : student.stop], teacher_pieces[teacher.start : teacher.stop]
    if pieces[0] == pieces[1]:
        return [Group(student, teacher, True)]
    texts = [_text(side) for side in pieces]
    if texts[0] == texts[1] or _squeezed(texts[0]) == _squeezed(texts[1]):
        has_marker = any(isinstance(piece, str) for side in pieces for piece in side)
        return [Group(student, teacher, texts[0] == texts[1] and not has_marker)]
    return [
        Group(student, range(teacher.start, teacher.start), False),
        Group(range(student.stop, student.stop), teacher, False),
    ]


def _spelling(decoder: Any) -> tuple[Callable[[str], bytes], Callable[[str], bytes]]:
    """Functions from a token to its bytes, and from an added token to its bytes, for a decoder of `tokenizers`."""
    state = json.loads(decoder.__getstate__()) if decoder is not None else {"decoders": []}
    steps = state.get("decoders", [state])
    kinds = {step["type"]: step for step in steps}
    # Added tokens are not encoded with the alphabet of these two.
    if "ByteLevel" in kinds:
        return _bytes_of_byte_level, str.encode
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"]["prefix"]
        return lambda token: (token[len(prefix) :] if token.startswith(prefix) else f" {token}").encode(), str.encode
    if "Metaspace" not in kinds and "Replace" not in kinds:
        raise ValueError(
            f"the text of single tokens cannot be derived from the tokenizer's decoder ({', '.join(kinds) or 'none'}); "
            "the decoders of byte-level, SentencePiece and WordPiece tokenizers are supported"
        )
    replacements = [_replacement(step) for step in steps if step["type"] in ("Metaspace", "Replace")]
    is_byte = re.compile("<0x[0-9A-F]{2}>" if "ByteFallback" in kinds else "(?!)").fullmatch

    def spell(token: str) -> bytes:
        if is_byte(token):
            return bytes([int(token[3:5], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return spell, spell


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    """The string that a step of a decoder replaces, and its replacement."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if "String" not in step["pattern"]:
        (pattern,) = step["pattern"].values()
        raise ValueError(
            f"the text of single tokens cannot be derived from the tokenizer's decoder, which replaces the regular "
            f"expression {pattern!r}; only replacements of plain strings are supported"
        )
    return step["pattern"]["String"], step["content"]


def _bytes_of_byte_level(token: str) -> bytes:
    try:
        return bytes(map(BYTES.__getitem__, token))
    except KeyError:
        return token.encode()  # as the decoder treats other characters


def _byte_alphabet() -> dict[str, int]:
    """The alphabet of byte-level vocabularies (GPT-2): printable bytes are themselves, other bytes start at 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


BYTES = _byte_alphabet()
