"""Alignment against brute force over byte boundaries, on tokenizers of every kind trained here on a few lines."""

import itertools
import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_distill.token_alignment import (
    OUTSIDE,
    UNNAMED,
    align,
    exact_fraction,
    group_numbers,
    shared_tokens,
    vocabulary_pieces,
)
from tests.conftest import SENTENCES, make_tokenizer

CORPUS = [*SENTENCES, "안녕하세요, 오늘 날씨가 좋네요.", "설날에는 떡국을 먹어요 🍕🎉", "def f(x):\n    return x\n"]
TEXTS = [
    "The small dog ran to the river.",
    "  two spaces,\ttab\n\n    indented  ",
    "안녕하세요 날씨 좋다",
    "unseen: 뷁 漢字 🦜👩‍👩‍👧 naïve",
    "x",
    "",
    "\n",
    "🍕",
    "aaaa aaaa aaaa!!!!",
]


def byte_level(vocab_size=384):
    return make_tokenizer(vocab_size, corpus=CORPUS)


def sentence_piece(kind, vocab_size=300):
    """BPE or Unigram with `▁`, byte fallback and a space before the text, as Llama and Mistral have them."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model = models.BPE(unk_token="<unk>") if kind == "bpe" else models.Unigram()
    trained = Tokenizer(model)
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    options = {"vocab_size": vocab_size, "special_tokens": special, "limit_alphabet": 60}
    if kind == "bpe":
        trained.train_from_iterator(CORPUS, trainers.BpeTrainer(**options))
        state = json.loads(trained.to_str())["model"]
        pieces = [*special, *bytes_, *(piece for piece in state["vocab"] if piece not in special)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        merges = [tuple(merge) for merge in state["merges"]]
        model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    else:
        trained.train_from_iterator(CORPUS, trainers.UnigramTrainer(unk_token="<unk>", vocab_size=vocab_size))
        scores = [pair for pair in json.loads(trained.to_str())["model"]["vocab"] if pair[0] not in special]
        # A text of single characters that is known must not go to bytes; characters beyond these must.
        vocab = [*((piece, 0.0) for piece in special), *((piece, -20.0) for piece in bytes_), *map(tuple, scores[:200])]
        model = models.Unigram(vocab, unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


INDENTS = ("▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁")


def indenting(decoder=None):
    """As Gemma has them: runs of spaces, newlines and tags are added tokens that are not special."""
    tokens = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "\n", "a", "b", "▁a", *INDENTS]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁▁▁▁", "▁▁▁▁"), ("▁", "a")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoder or decoders.Sequence(steps)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*INDENTS, "\n", "<table>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]"
    )


TOKENIZERS = {
    "byte_level": byte_level(),
    "small_byte_level": byte_level(270),
    "bpe": sentence_piece("bpe"),
    "unigram": sentence_piece("unigram"),
    "word_piece": word_piece(),
}
PIECES = {name: vocabulary_pieces(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PAIRS = list(itertools.permutations(TOKENIZERS, 2))
LOSSLESS = [name for name in TOKENIZERS if name != "word_piece"]


def pieces_of(name, text):
    ids = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
    return [PIECES[name][i] for i in ids]


def join(pieces):
    return b"".join(piece for piece in pieces if isinstance(piece, bytes))


def without_space(text):
    return b"".join(text.lower().split())


def spans(groups, student, teacher):
    return [(student[g.student.start : g.student.stop], teacher[g.teacher.start : g.teacher.stop]) for g in groups]


def covers_everything(groups, student, teacher):
    return [i for g in groups for i in g.student] == list(range(len(student))) and [
        i for g in groups for i in g.teacher
    ] == list(range(len(teacher)))


def boundaries(pieces):
    return list(itertools.accumulate((len(piece) for piece in pieces), initial=0))


# ------------------------------------------------------------------------------------------------------ vocabularies


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_pieces_of_a_text_are_the_bytes_of_the_text(name, text):
    """SentencePiece writes a space before the text, which its decoder takes away again."""
    prefix = b"" if name.endswith("byte_level") or not text else b" "
    assert join(pieces_of(name, text)) == prefix + text.encode()


def test_byte_fallback_and_split_characters_occur_in_these_tests():
    assert any(len(piece) == 1 and piece[0] > 127 for piece in pieces_of("bpe", TEXTS[3]))
    assert any(len(piece) == 1 and piece[0] > 127 for piece in pieces_of("unigram", TEXTS[3]))
    assert any(len(piece) == 1 and piece[0] > 127 for piece in pieces_of("byte_level", TEXTS[3]))


def test_word_pieces_begin_with_a_space_unless_they_continue_a_word():
    vocab, pieces = TOKENIZERS["word_piece"].get_vocab(), PIECES["word_piece"]
    assert pieces[vocab["the"]] == b" the"
    assert pieces[vocab["##e"]] == b"e"


def test_special_tokens_are_markers_and_other_added_tokens_are_text():
    tokenizer = make_tokenizer(added_tokens=("é한",))  # its characters are not the ones of the byte alphabet
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    pieces = vocabulary_pieces(tokenizer)
    vocab = tokenizer.get_vocab()
    assert pieces[vocab["é한"]] == "é한".encode()
    found = [pieces[vocab[token]] for token in ("<eos>", "<pad>", "<|call|>")]
    assert found == ["eos", "<pad>", "<|call|>"]
    assert [PIECES["bpe"][i] for i in (0, 1, 2)] == ["<unk>", "bos", "eos"]


def test_added_tokens_of_sentence_piece_are_spelled_as_they_are_decoded():
    """Indentation is text like any other: both vocabularies have it."""
    tokenizer, text = indenting(), "a\n        b    a\n  é<table>"
    pieces, vocab = vocabulary_pieces(tokenizer), tokenizer.get_vocab()
    for token in (*INDENTS, "\n", "<table>", "▁a", "b"):
        assert pieces[vocab[token]] == tokenizer.decode([vocab[token]]).encode()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert {vocab["▁▁"], vocab["▁▁▁▁"], vocab["▁▁▁▁▁▁▁▁"]} <= set(ids)
    assert join([pieces[i] for i in ids]) == text.encode()
    other = [b" " * n for n in range(1, 9)]
    shared = shared_tokens(pieces, other)
    assert shared.student_names[[vocab[token] for token in INDENTS]].tolist() == [
        shared.teacher_names[n - 1] for n in (2, 4, 8)
    ]


def test_added_tokens_of_word_piece_are_written_as_they_are():
    tokenizer = word_piece()
    tokenizer.add_tokens(["##x▁"])
    assert vocabulary_pieces(tokenizer)[tokenizer.get_vocab()["##x▁"]] == "##x▁".encode()


def test_steps_of_a_decoder_count_in_their_order():
    steps = [decoders.Replace("▁", "b"), decoders.Replace("b", "cc"), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer = indenting(decoders.Sequence(steps))
    pieces, vocab = vocabulary_pieces(tokenizer), tokenizer.get_vocab()
    for token in ("▁a", "b", "▁▁", "<0x41>", "<table>"):
        assert pieces[vocab[token]] == tokenizer.decode([vocab[token]]).encode()
    assert pieces[vocab["▁a"]] == b"cca"


def test_ids_that_are_no_token_have_no_piece():
    vocab = {**{c: i for i, c in enumerate("abcdĠ")}, "e": 9}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    pieces = vocabulary_pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert pieces == [b"a", b"b", b"c", b"d", b" ", None, None, None, None, b"e"]


def test_tokenizers_that_do_not_tell_their_text_are_refused():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match=r"BPEDecoder.*byte-level, SentencePiece and WordPiece"):
        vocabulary_pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    by_pattern = decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()])
    with pytest.raises(ValueError, match=r"regular expression '▁\+'"):
        vocabulary_pieces(indenting(by_pattern))
    with pytest.raises(ValueError, match="load the fast tokenizer"):
        vocabulary_pieces(object())


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_names_are_the_longest_shared_beginnings(student, teacher):
    sides = PIECES[student], PIECES[teacher]
    shared = shared_tokens(*sides)
    common = [piece for piece in set(sides[0]) & set(sides[1]) if piece is not None]
    assert sorted(map(str, common)) == sorted(str(sides[0][i]) for i in shared.student_ids)
    assert [sides[0][i] for i in shared.student_ids] == [sides[1][i] for i in shared.teacher_ids]
    texts = [sides[0][i] for i in shared.student_ids]
    for pieces, names in zip(sides, shared[2:], strict=True):
        assert len(names) == len(pieces)
        for piece, name in zip(pieces, names.tolist(), strict=True):
            if isinstance(piece, bytes):
                beginnings = [text for text in common if isinstance(text, bytes) and piece.startswith(text)]
                assert (texts[name] == max(beginnings, key=len)) if beginnings else name == UNNAMED
            else:
                assert texts[name] == piece if piece in common else name == OUTSIDE


def test_equal_vocabularies_are_shared_whole():
    shared = shared_tokens(PIECES["byte_level"], PIECES["byte_level"])
    assert all(ids.tolist() == list(range(len(PIECES["byte_level"]))) for ids in shared)


def test_bytes_of_sentence_piece_that_are_also_letters_share_the_letters_name():
    """`<0x54>` and `T` are both b"T"; the letter is what a text is written with."""
    vocab = TOKENIZERS["bpe"].get_vocab()
    shared = shared_tokens(PIECES["bpe"], PIECES["byte_level"])
    name = shared.student_names[vocab["T"]]
    assert shared.student_names[vocab["<0x54>"]] == name
    assert shared.student_ids[name] == vocab["T"]


# --------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(LOSSLESS, repeat=2)))
def test_groups_end_wherever_both_sides_end_a_token(student, teacher, text):
    """Against the intersection of all byte boundaries; a space that SentencePiece adds to one side is no text."""
    sides = pieces_of(student, text), pieces_of(teacher, text)
    groups = align(*sides)
    assert covers_everything(groups, *sides)
    found = [(join(s), join(t)) for s, t in spans(groups, *sides) if s and t]
    written = join(sides[0])
    ends = [set(boundaries(side)) for side in sides]
    if written != join(sides[1]):
        written = text.encode()
        added = [len(join(side)) - len(written) for side in sides]
        assert sorted(added) == [0, 1]
        ends = [{max(end - n, 0) for end in side} for side, n in zip(ends, added, strict=True)]
        if found[0][0] != found[0][1]:
            found[0] = tuple(x.removeprefix(b" ") if n else x for x, n in zip(found[0], added, strict=True))
    common = sorted(ends[0] & ends[1])
    assert found == [(written[a:b],) * 2 for a, b in itertools.pairwise(common)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_nothing_is_lost_and_comparable_groups_are_the_same_bytes(student, teacher, text):
    sides = pieces_of(student, text), pieces_of(teacher, text)
    groups = align(*sides)
    assert covers_everything(groups, *sides)
    for group, (s, t) in zip(groups, spans(groups, *sides), strict=True):
        if s and t:
            assert without_space(join(s)) == without_space(join(t))
        if group.comparable:
            assert join(s) == join(t)
            assert s
            assert t


def test_equal_tokenisations_are_aligned_one_to_one():
    pieces = ["bos", *pieces_of("bpe", TEXTS[3]), "eos"]
    groups = align(pieces, pieces)
    assert [(list(g.student), list(g.teacher)) for g in groups] == [([i], [i]) for i in range(len(pieces))]
    assert all(group.comparable for group in groups)
    assert exact_fraction(groups) == 1


def test_a_character_cut_in_different_places_is_one_group():
    pizza = "🍕".encode()
    student, teacher = [b" " + pizza[:2], pizza[2:], b"!"], [b" ", pizza[:3], pizza[3:] + b"!"]
    assert spans(align(student, teacher), student, teacher) == [(student, teacher)]
    student, teacher = [pizza[:1], pizza[1:2], pizza[2:]], [pizza[:2], pizza[2:]]
    assert spans(align(student, teacher), student, teacher) == [(student[:2], teacher[:1]), (student[2:], teacher[1:])]


def test_words_without_spaces_and_case_are_aligned_but_not_compared():
    student = pieces_of("word_piece", "The dog, (Tom) ran")
    teacher = [b"The", b" dog", b",", b" (", b"Tom", b")", b" ran"]
    groups = align(student, teacher)
    words = [b"the", b"dog", b",", b"(", b"tom", b")", b"ran"]
    assert [without_space(join(s)) for s, _ in spans(groups, student, teacher)] == words
    assert [t for _, t in spans(groups, student, teacher)] == [[piece] for piece in teacher]
    assert [group.comparable for group in groups] == [False, True, False, True, False, False, True]


def test_alignment_resumes_after_a_word_that_one_side_does_not_know():
    text = "The dog ate 🦜 and the children played inside"
    student, teacher = pieces_of("word_piece", text), pieces_of("byte_level", text)
    assert "[UNK]" in student
    groups = align(student, teacher)
    after = [group for group in groups if group.student and group.student.start > student.index("[UNK]") + 1]
    assert all(group.comparable for group in after)
    assert join(teacher[after[0].teacher.start :]) == b" the children played inside"


def test_alignment_resumes_after_long_texts_that_differ():
    shared = [b" once", b" upon", b" a", b" time"]
    student, teacher = [b"System:", b" you", b" are", b" old."] * 60 + shared, [b"%d," % i for i in range(99)] + shared
    groups = align(student, teacher)
    assert covers_everything(groups, student, teacher)
    assert [(len(g.student), len(g.teacher), g.comparable) for g in groups[-4:]] == [(1, 1, True)] * 4


def test_texts_with_nothing_in_common_stay_alone():
    groups = align([b"abc", b"def"], [b"uvw", b"xyz"])
    assert not any(group.comparable or (group.student and group.teacher) for group in groups)
    assert covers_everything(groups, [0, 0], [0, 0])


def test_a_truncated_side_is_aligned_as_far_as_it_goes():
    student, teacher = [b"one", b" two", b" three"], [b"one", b" t", b"wo", b" thr"]
    groups = align(student, teacher)
    assert spans(groups, student, teacher) == [
        ([b"one"], [b"one"]), ([b" two"], [b" t", b"wo"]), ([b" three"], []), ([], [b" thr"]),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------- markers, templates


def test_markers_are_paired_by_role_and_others_stay_alone():
    student, teacher = ["bos", b"Hi", "eos"], [b"Hi", "<|end|>", "eos", "<pad>"]
    groups = align(student, teacher)
    assert spans(groups, student, teacher) == [
        (["bos"], []), ([b"Hi"], [b"Hi"]), ([], ["<|end|>"]), (["eos"], ["eos"]), ([], ["<pad>"]),
    ]  # fmt: skip
    assert [group.comparable for group in groups] == [False, True, False, True, False]
    assert group_numbers(groups, [True] * 3, [True] * 4) == ([-1, 1, 3], [1, -1, 3, -1])
    assert exact_fraction(groups) == 2 / 3


def test_a_group_with_a_token_that_does_not_count_has_no_number():
    """The first token of a sequence is not predicted by any position; a group without it would be another text."""
    groups = align([b"T", b"he", b" dog"], ["bos", b"The", b" d", b"og"])
    assert group_numbers(groups, [True] * 3, [True] * 4) == ([1, 1, 2], [-1, 1, 2, 2])
    assert group_numbers(groups, [False, True, True], [False, True, True, True]) == ([-1, -1, 2], [-1, -1, 2, 2])
    assert group_numbers(groups, [True] * 3, [False, True, True, False]) == ([1, 1, -1], [-1, 1, -1, -1])


def test_eos_between_packed_texts_is_paired_where_it_stands():
    student, teacher = [b"one", b" two", "eos", b"three", "eos"], [b"one two", "eos", "bos", b"thr", b"ee", "eos"]
    groups = align(student, teacher)
    assert [(s, t) for s, t in spans(groups, student, teacher) if s and t] == [
        ([b"one", b" two"], [b"one two"]), (["eos"], ["eos"]), ([b"three"], [b"thr", b"ee"]), (["eos"], ["eos"]),
    ]  # fmt: skip


def test_a_marker_inside_a_group_keeps_it_from_being_compared():
    student, teacher = [b"ca", "<|x|>", b"t", b"!"], [b"cat", b"!"]
    groups = align(student, teacher)
    assert [group.comparable for group in groups] == [False, True]
    assert covers_everything(groups, student, teacher)


CHATS = {
    "long": ["Where do you live, my friend?", "I live in a house by the river.", "And with whom?", "With 🍕 안녕"],
    # Contents that are part of the templates themselves, and the same content twice.
    "short": ["a", "ok", "INST", "a"],
    "spaces": ["  two\n\nlines ", "def f():\n    return 1", "ok", "ok"],
}


def chat_ml(contents):
    pieces = []
    for i, content in enumerate(contents):
        role = "assistant" if i % 2 else "user"
        pieces += ["<|im_start|>", *pieces_of("byte_level", f"{role}\n"), *pieces_of("byte_level", content)]
        pieces += ["eos", b"\n"]
    return pieces


def llama_2(contents):
    pieces = []
    for i, content in enumerate(contents):
        if i % 2:
            pieces += [*pieces_of("bpe", f"{content.strip()} "), "eos"]
        else:
            pieces += ["bos", *pieces_of("bpe", f"[INST] {content.strip()} [/INST]")]
    return pieces


@pytest.mark.parametrize("chat", CHATS)
def test_two_chat_templates_are_aligned_on_the_contents(chat):
    student, teacher = chat_ml(CHATS[chat]), llama_2(CHATS[chat])
    for sides in ((student, teacher), (teacher, student)):
        groups = align(*sides, contents=CHATS[chat])
        assert covers_everything(groups, *sides)
        pairs = [(s, t) for s, t in spans(groups, *sides) if s and t]
        text = b"".join(join(s) for s, _ in pairs)
        assert without_space(text) == without_space("".join(CHATS[chat]).encode())
        assert [s for s, _ in pairs if s == ["eos"]] == [["eos"]] * 2  # after each answer; questions end otherwise


def test_without_contents_long_messages_are_found_again():
    groups = align(chat_ml(CHATS["long"]), llama_2(CHATS["long"]))
    pairs = spans(groups, chat_ml(CHATS["long"]), llama_2(CHATS["long"]))
    text = without_space(b"".join(join(s) for s, t in pairs if s and t))
    assert without_space(CHATS["long"][0].encode()) in text
    assert without_space(CHATS["long"][1].encode()) in text


@pytest.mark.parametrize(
    ("contents", "num_pairs"),
    [(["Who is it?", "ZZ."], 0), (["ZZ.", "It is."], 1), (["Who is it?", "ZZ.", "And now?", "It is."], 1)],
)
def test_markers_are_not_paired_across_a_content_that_one_side_does_not_have(contents, num_pairs):
    student, teacher = chat_ml(contents), llama_2([content.replace("ZZ.", "?") for content in contents])
    for sides in ((student, teacher), (teacher, student)):
        groups = align(*sides, contents=contents)
        assert covers_everything(groups, *sides)
        pairs = [group for group in groups if group.comparable and sides[0][group.student.start] == "eos"]
        assert len(pairs) == num_pairs
        # A pair is of what ends the last answer on both sides.
        assert all(sides[0][pair.student.stop :] in ([], [b"\n"]) for pair in pairs)


def test_contents_that_one_side_does_not_have_are_left_out():
    student, teacher = [b"[", b"yes", b"]"], [b"<", b"ye", b"s", b">"]
    groups = align(student, teacher, contents=["gone", "yes", ""])
    assert [(s, t) for s, t in spans(groups, student, teacher) if s and t] == [([b"yes"], [b"ye", b"s"])]
