"""Texts of single tokens, for people: tables of them, and the tokens of a row as pieces of its text."""

import codecs
from collections.abc import Sequence
from typing import Any

from hf_distill.token_alignment import vocabulary_pieces


def token_texts(tokenizer: Any) -> list[str | bytes]:
    """The text of every token id as bytes, as part of a text; as `str` for markers (`<s>`), and where it is unknown.

    A tokenizer that does not tell how its tokens become text gives their names in its vocabulary.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast one tells more.
    """
    vocabulary = tokenizer.get_vocab()
    names: list[str | bytes] = [""] * (max(vocabulary.values()) + 1)
    for name, index in vocabulary.items():
        names[index] = name
    try:
        pieces = vocabulary_pieces(tokenizer)
    except ValueError:
        return names
    names += [""] * (len(pieces) - len(names))
    return [piece if isinstance(piece, bytes) else name for piece, name in zip(pieces, names, strict=False)]


def shown(text: str | bytes) -> str:
    """The text of a token by itself; bytes that are no whole character as `\\xec`."""
    return text if isinstance(text, str) else text.decode("utf-8", "backslashreplace")


def texts_of_row(ids: Sequence[int], texts: Sequence[str | bytes]) -> list[str]:
    """The text that each token of a row adds: a character of several tokens stands at the last of them.

    Args:
        ids: token ids.
        texts: the text of every id ([`token_texts`]); ids past it have none.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found: list[str] = []
    for index in ids:
        text = texts[index] if index < len(texts) else ""
        if isinstance(text, bytes):
            found.append(decoder.decode(text))
        else:
            found.append(decoder.decode(b"", final=True) + text)
            decoder.reset()
    if found and (rest := decoder.decode(b"", final=True)):
        found[-1] += rest
    return found
