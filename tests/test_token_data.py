"""The plain JSON of a comparison, and the texts of tokens."""

import numpy as np
import pytest

from hf_distill.token_comparison import EXACT, Side, TokenComparison, TokenRow
from hf_distill.token_data import comparison_data
from hf_distill.token_texts import shown, texts_of_row, token_texts
from tests.conftest import make_tokenizer


def side(ids, probs, own):
    return Side(np.array(ids), np.array(probs, dtype=np.float32), np.array(own, dtype=np.float32))


def shared(texts=(b"<", b" a", b" b", b"c", b"d", b"e", b"f")):
    """A comparison of one row, whose sides have one vocabulary."""
    student = side([[1, 2, 3, 4, 5]], [[0.5, 0.25, 0.125, 0.06, 0.01]], [0.25])
    teacher = side([[2, 1, -1, -1, -1]], [[0.9, 0.1, 0, 0, 0]], [np.nan])
    row = TokenRow(7, [0, 2], 9, np.array([1]), np.array([1.23456]), student, teacher)
    return TokenComparison([row], EXACT, [], 8, texts, texts)


def test_numbers_point_into_the_table_and_are_rounded():
    data = comparison_data(shared(), marks={7: "cd"})
    texts = data["texts"]
    (row,) = data["rows"]
    assert [texts[i] for i in row["tokens"]] == ["<", " b"]
    assert (row["number"], row["length"], row["places"], row["kl"]) == (7, 9, [1], [1.2346])
    assert [texts[i] for i in row["student"]["ids"]] == [" a", " b", "c", "d", "e"]
    assert row["student"]["probs"] == [500, 250, 125, 60, 10]
    assert [i if i < 0 else texts[i] for i in row["teacher"]["ids"]] == [" b", " a", -1, -1, -1]
    assert (row["student"]["own"], row["teacher"]["own"]) == ([250], [None])
    assert (row["pieces"], row["marks"]) == ({}, "c")
    assert texts[0] == " b"  # the most frequent one first, so that indices are short
    assert "f" not in texts


def test_two_vocabularies_have_their_texts_in_common():
    data = comparison_data(shared()._replace(teacher_texts=[b"x", b" b", b" a"]))
    texts, (row,) = data["texts"], data["rows"]
    assert [i if i < 0 else texts[i] for i in row["teacher"]["ids"]] == [" a", " b", -1, -1, -1]
    assert len(texts) == len(set(texts))


def test_a_character_of_several_tokens_stands_at_the_last_of_them(tokenizer):
    texts = token_texts(tokenizer)
    ids = tokenizer("안녕 <eos> é")["input_ids"]
    pieces = texts_of_row(ids, texts)
    assert "".join(pieces) == "안녕 <eos> é"
    assert pieces[0] == ""
    assert "안" in pieces
    assert shown(texts[ids[0]]) == "\\xec"


def test_bytes_that_end_too_early_are_shown_as_broken(tokenizer):
    texts = token_texts(tokenizer)
    ids = tokenizer("안녕")["input_ids"]
    assert "".join(texts_of_row(ids[:-1], texts)) == "안\ufffd"
    assert texts_of_row([10**6], texts) == [""]


def test_a_tokenizer_that_does_not_tell_gives_its_names():
    class Slow:
        def get_vocab(self):
            return {"a": 0, "b": 2}

    assert token_texts(Slow()) == ["a", "", "b"]


@pytest.mark.parametrize("size", [300, 384])
def test_texts_of_a_row_are_the_text(size):
    tokenizer = make_tokenizer(vocab_size=size)
    text = "The dog ate\n\ttwo  apples."
    assert "".join(texts_of_row(tokenizer(text)["input_ids"], token_texts(tokenizer))) == text
