"""Prompts of two views, against chat templates and tokenizers applied by hand."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from hf_distill.collators import LUPICollator, PromptCollator, encoded, pad_prompts
from tests.conftest import CHAT_TEMPLATE, SENTENCES, make_tokenizer

EOS = 1
TEMPLATE = "[Background Knowledge]\n{knowledge}\n\n{query}"
ROWS = [
    {"query": "Where did the dog run?", "knowledge": SENTENCES[0]},
    {"query": "How many apples?", "knowledge": SENTENCES[1] + "\n\n" + SENTENCES[2]},
    {"query": "Who sang on the fence, and until when?", "knowledge": SENTENCES[3]},
]
KOREAN = Path(__file__).parents[2] / "shared" / "data" / "korean_culture"
FEW_SHOT = [
    {"query": "What froze?", "knowledge": SENTENCES[7], "answer": "The pond."},
    {"query": "When does it leave?", "knowledge": SENTENCES[5], "answer": "At nine."},
]


def make_bos_tokenizer():
    """Adds `<bos>` and `<eos>` to every text on its own."""
    tokenizer = make_tokenizer(added_tokens=("<bos>",))
    tokenizer.bos_token = "<bos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", EOS)]
    )
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    assert tokenizer("a b")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("a b")["input_ids"][-1] == EOS
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(tokenizer, *messages, generate=True):
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=generate, return_dict=False)


def teacher_text(query, knowledge):
    return f"[Background Knowledge]\n{knowledge}\n\n{query}"


def unpadded(batch, name):
    ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


# -------------------------------------------------------------------------------------------------------- two prompts


def test_student_reads_the_query_and_teacher_also_the_knowledge(tokenizer):
    batch = LUPICollator(tokenizer)(ROWS)
    assert sorted(batch) == [
        "student_prompt_ids", "student_prompt_mask", "teacher_prompt_ids", "teacher_prompt_mask"
    ]  # fmt: skip
    assert unpadded(batch, "student_prompt") == [chat(tokenizer, user(row["query"])) for row in ROWS]
    assert unpadded(batch, "teacher_prompt") == [chat(tokenizer, user(teacher_text(**row))) for row in ROWS]
    for side in ("student_prompt", "teacher_prompt"):
        ids, mask = batch[f"{side}_ids"], batch[f"{side}_mask"].bool()
        assert mask[:, -1].all(), "padded on the right"
        assert (mask[:, 1:] >= mask[:, :-1]).all()
        assert (ids[~mask] == tokenizer.pad_token_id).all()
        assert mask.any(0).all(), "wider than the longest row"
    assert LUPICollator(tokenizer).encode(ROWS[0])["knowledge_truncated"] is False


def test_system_prompt_and_few_shot_turns_come_first_and_only_for_the_teacher(tokenizer):
    collator = LUPICollator(tokenizer, system_prompt="Answer {briefly}.", few_shot=FEW_SHOT)
    shown = [
        message
        for turn in FEW_SHOT
        for message in (user(teacher_text(turn["query"], turn["knowledge"])), assistant(turn["answer"]))
    ]
    for row in ROWS:
        found = collator.encode(row)
        system = {"role": "system", "content": "Answer {briefly}."}
        assert found["teacher_prompt_ids"] == chat(tokenizer, system, *shown, user(teacher_text(**row)))
        assert found["student_prompt_ids"] == chat(tokenizer, user(row["query"]))


def test_columns_and_template_have_the_names_they_are_given(tokenizer):
    collator = LUPICollator(
        tokenizer, query_column="q", knowledge_column="k", knowledge_template="{query} -- {knowledge} -- {query}?"
    )
    found = collator.encode({"q": "Who ran?", "k": "The dog.", "query": "unused", "knowledge": "unused"})
    assert found["teacher_prompt_ids"] == chat(tokenizer, user("Who ran? -- The dog. -- Who ran??"))
    assert found["student_prompt_ids"] == chat(tokenizer, user("Who ran?"))
    with pytest.raises(ValueError, match="a row has no column 'k'; its columns are q, knowledge"):
        collator.encode({"q": "Who ran?", "knowledge": "The dog."})


@pytest.mark.parametrize(
    ("query", "knowledge"),
    [
        ("What is {x}?", "A set {1, 2} and {}."),
        ("Print {knowledge}", "It is {query} in braces."),
        ("{query} {query}", "{knowledge}"),
        ("{0} {} {{", "}} %s %(a)s $a \\1 \\g<0>"),
        ("{{ messages }} {% if %}", "{# comment #}"),
    ],
)
def test_braces_are_text(tokenizer, query, knowledge):
    found = LUPICollator(tokenizer).encode({"query": query, "knowledge": knowledge})
    assert found["teacher_prompt_ids"] == chat(tokenizer, user(teacher_text(query, knowledge)))
    assert found["student_prompt_ids"] == chat(tokenizer, user(query))
    templated = LUPICollator(tokenizer, knowledge_template='{"k": {knowledge}, "q": {query}}')
    text = '{"k": ' + knowledge + ', "q": ' + query + "}"
    assert templated.encode({"query": query, "knowledge": knowledge})["teacher_prompt_ids"] == chat(
        tokenizer, user(text)
    )


@pytest.mark.parametrize("name", ["korean_culture_train_200.json", "korean_culture_train_200_en.json"])
def test_every_row_of_a_real_data_set_comes_back_as_it_was(tokenizer, name):
    path = KOREAN / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = json.loads(path.read_text(encoding="utf-8"))[:60]
    for row in rows:
        found = LUPICollator(tokenizer).encode(row)
        student, teacher = (tokenizer.decode(found[f"{side}_prompt_ids"]) for side in ("student", "teacher"))
        assert student == f"<|user|>{row['query']}<eos><|assistant|>"
        assert teacher == f"<|user|>{teacher_text(row['query'], row['knowledge'])}<eos><|assistant|>"
    # Cut between words: what is left of the knowledge is a beginning of it, and decodes without a broken character.
    collator = LUPICollator(tokenizer, max_prompt_length=400)
    truncated = [row for row in rows if collator.encode(row)["knowledge_truncated"]]
    assert len(truncated) > 5
    for row in truncated[:5]:
        check_truncation(tokenizer, row, 400, row["knowledge"].split(" "), " ")


def test_completions_are_the_same_for_both_sides_and_end_once(tokenizer):
    rows = [{**row, "answer": f"It is {i}."} for i, row in enumerate(ROWS)]
    batch = LUPICollator(tokenizer, completion_column="answer", system_prompt="Be kind.")(rows)
    for i, completion in enumerate(unpadded(batch, "completion")):
        question = user(rows[i]["query"])
        whole = chat(tokenizer, question, assistant(rows[i]["answer"]), generate=False)
        assert chat(tokenizer, question) + completion == whole
        assert completion.count(EOS) == 1
        assert completion[-1] == EOS
    assert (batch["completion_mask"][:, 1:] <= batch["completion_mask"][:, :-1]).all()
    assert "completion_ids" not in LUPICollator(tokenizer)(rows)
    with pytest.raises(ValueError, match="row 1 has no 'answer'"):
        LUPICollator(tokenizer, completion_column="answer")([rows[0], {**rows[1], "answer": None}])


def test_special_tokens_are_those_of_the_template():
    tokenizer = make_bos_tokenizer()
    collator = LUPICollator(tokenizer, completion_column="answer")
    found = collator.encode({**ROWS[0], "answer": "To the river."})
    for side, text in (("student", ROWS[0]["query"]), ("teacher", teacher_text(**ROWS[0]))):
        ids = found[f"{side}_prompt_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids) == f"<bos><|user|>{text}<eos><|assistant|>"
    assert tokenizer.decode(found["completion_ids"]) == "To the river.<eos>"


# --------------------------------------------------------------------------------------------------- missing knowledge


@pytest.mark.parametrize("missing", [{}, {"knowledge": None}, {"knowledge": ""}, {"knowledge": " \n"}])
def test_missing_knowledge_is_refused_by_name_or_passed_through(tokenizer, missing):
    row = {"query": "Who ran?", **missing}
    there = r"row 17 has no 'knowledge'.*allow_missing_knowledge"
    message = there if missing else "row 17 has no column 'knowledge'; its columns are query"
    with pytest.raises(ValueError, match=message):
        LUPICollator(tokenizer).encode(row, "row 17")
    with pytest.raises(ValueError, match=message.replace("17", "1")):
        LUPICollator(tokenizer)([ROWS[0], row])
    found = LUPICollator(tokenizer, allow_missing_knowledge=True, system_prompt="Be kind.").encode(row)
    system = {"role": "system", "content": "Be kind."}
    assert found["teacher_prompt_ids"] == chat(tokenizer, system, user("Who ran?"))
    assert found["student_prompt_ids"] == chat(tokenizer, user("Who ran?"))


@pytest.mark.parametrize("query", [None, "", "  \n"])
def test_empty_queries_are_refused_by_name(tokenizer, query):
    for collator in (LUPICollator(tokenizer), LUPICollator(tokenizer, allow_missing_knowledge=True)):
        with pytest.raises(ValueError, match="row 3 has no 'query'"):
            collator.encode({"query": query, "knowledge": "The dog."}, "row 3")


def test_a_query_with_a_copy_of_the_knowledge_is_refused_and_shared_words_are_not(tokenizer):
    collator = LUPICollator(tokenizer)
    knowledge = "The small dog  ran\nto the river."
    for query in (knowledge, f"Given: {knowledge} Who ran?", "The small dog ran to the river. Who?"):
        with pytest.raises(ValueError, match="the student's prompt of row 2 holds a copy of its 'knowledge'"):
            collator.encode({"query": query, "knowledge": knowledge}, "row 2")
    for query in ("Who ran to the river?", "The small dog ran to the", "the river. The small dog ran"):
        collator.encode({"query": query, "knowledge": knowledge})
    # A query may be a part of the knowledge.
    collator.encode({"query": "The small dog", "knowledge": knowledge})


# ---------------------------------------------------------------------------------------------------------- truncation


def check_truncation(tokenizer, row, limit, pieces, separator, **settings):
    """What is left of the knowledge are as many of its pieces as fit; one more would be too long."""
    system = [{"role": "system", "content": settings["system_prompt"]}] if "system_prompt" in settings else []
    found = LUPICollator(tokenizer, max_prompt_length=limit, **settings).encode(row)
    texts = [
        teacher_text(row["query"], separator.join(pieces[:n])) if n else row["query"] for n in range(len(pieces) + 1)
    ]
    prompts = [chat(tokenizer, *system, user(text)) for text in texts]
    assert found["teacher_prompt_ids"] in prompts
    kept = prompts.index(found["teacher_prompt_ids"])
    assert len(prompts[kept]) <= limit
    assert kept == len(pieces) or len(prompts[kept + 1]) > limit
    assert found["knowledge_truncated"] == (kept < len(pieces))
    assert found["student_prompt_ids"] == chat(tokenizer, user(row["query"]))
    return kept


@pytest.mark.parametrize("settings", [{}, {"system_prompt": "Be kind."}], ids=["plain", "system"])
def test_as_many_words_of_the_knowledge_are_kept_as_fit(tokenizer, settings):
    row = {"query": "Where did the {small} dog run?", "knowledge": " ".join(SENTENCES)}
    words = row["knowledge"].split(" ")
    whole = len(LUPICollator(tokenizer, **settings).encode(row)["teacher_prompt_ids"])
    bare = len(LUPICollator(tokenizer, allow_missing_knowledge=True, **settings).encode(
        {"query": row["query"]}
    )["teacher_prompt_ids"])  # fmt: skip
    kept = [
        check_truncation(tokenizer, row, limit, words, " ", allow_missing_knowledge=True, **settings)
        for limit in [*range(bare, whole, 9), whole - 1]
    ]
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert kept[-1] == len(words) - 1
    assert check_truncation(tokenizer, row, whole, words, " ", **settings) == len(words)
    with pytest.raises(ValueError, match=f"max_prompt_length={bare} leaves no room for 'knowledge' of row 4"):
        LUPICollator(tokenizer, max_prompt_length=bare, **settings).encode(row, "row 4")
    with pytest.raises(ValueError, match=f"row 4 .* tokens, more than max_prompt_length={bare - 1}"):
        LUPICollator(tokenizer, max_prompt_length=bare - 1, **settings).encode(row, "row 4")


def test_text_without_spaces_is_cut_between_characters(tokenizer):
    knowledge = "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少" * 3
    row = {"query": "誰?", "knowledge": knowledge}
    for limit in (60, 61, 62, 90):
        assert 0 < check_truncation(tokenizer, row, limit, list(knowledge), "") < len(knowledge)


def test_lines_are_words_too(tokenizer):
    knowledge = "\n".join(SENTENCES[0].split())
    assert 0 < check_truncation(tokenizer, {"query": "Who?", "knowledge": knowledge}, 36, knowledge.split(), "\n") < 11


def test_few_shot_turns_are_never_truncated(tokenizer):
    row = {"query": "Who?", "knowledge": " ".join(SENTENCES)}
    settings = {"few_shot": FEW_SHOT, "system_prompt": "Be kind."}
    whole = tokenizer.decode(LUPICollator(tokenizer, **settings).encode(row)["teacher_prompt_ids"])
    found = LUPICollator(tokenizer, max_prompt_length=200, **settings).encode(row)
    assert len(found["teacher_prompt_ids"]) <= 200
    beginning, question = tokenizer.decode(found["teacher_prompt_ids"]).rsplit("[Background Knowledge]", 1)
    assert whole.startswith(beginning)
    assert FEW_SHOT[1]["knowledge"] in beginning
    assert question.endswith("\n\nWho?<eos><|assistant|>")


def test_truncated_rows_are_counted_once_a_batch(tokenizer, caplog):
    long = {"query": "Who?", "knowledge": " ".join(SENTENCES)}
    collator = LUPICollator(tokenizer, max_prompt_length=80)
    with caplog.at_level(logging.WARNING):
        collator([ROWS[0], ROWS[2]])
        assert not caplog.records
        batch = collator([long, ROWS[0], long])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 of 3 rows" in caplog.text
    assert "max_prompt_length" in caplog.text
    assert batch["teacher_prompt_ids"].shape[1] <= 80


def test_a_query_that_does_not_fit_is_refused_by_name(tokenizer):
    row = {"query": " ".join(SENTENCES), "knowledge": "The dog."}
    with pytest.raises(ValueError, match=r"query of row 5 take .* tokens, more than max_prompt_length=20"):
        LUPICollator(tokenizer, max_prompt_length=20).encode(row, "row 5")


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knowledge_template": "{query}"}, r"knowledge_template has to contain \{knowledge\}"),
        ({"knowledge_template": "{knowledge}"}, r"has to contain \{query\}"),
        ({"knowledge_template": "{ query } {}"}, r"has to contain \{knowledge\} and \{query\}"),
        ({"few_shot": [FEW_SHOT[0], {"query": "a", "answer": "b"}]}, r"few_shot\[1\] has no knowledge"),
        ({"few_shot": [{"query": "a", "knowledge": "", "answer": None}]}, r"few_shot\[0\] has no answer, knowledge"),
        ({"few_shot": [{}]}, r"few_shot\[0\] has no answer, knowledge, query"),
        ({"max_prompt_length": 0}, "max_prompt_length has to be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_in_words(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        LUPICollator(tokenizer, **settings)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"messages": "hello"}, "row 7 has 'hello' as its 'messages', which has to be messages"),
        ({"messages": ["a", "b"]}, r"row 7 has \['a', 'b'\] as its 'messages'"),
        ({"messages": {"role": "user", "content": "a"}}, "row 7 has .* as its 'messages'"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, r"refuses row 7 \(Invalid role .*narrator\)"),
        ({"messages": [{"role": "user", "content": 5}]}, "a message of row 7 has 5 as its content"),
        ({"prompt": [{"role": "user", "content": "a"}, "b"]}, "a message of row 7 is 'b'"),
        ({"prompt": [{"role": "user", "content": "a"}], "tools": "search"}, "row 7 has 'search' as its 'tools'"),
    ],
)
def test_a_dirty_row_of_prompts_is_named(tokenizer, cells, message):
    with pytest.raises(ValueError, match=message):
        PromptCollator(tokenizer).encode(cells, "row 7")


def test_few_shot_turns_that_are_no_dicts_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"few_shot\[0\] has to be a dict with query, .* got 'Who\?'"):
        LUPICollator(tokenizer, few_shot=["Who?"])


def test_messages_need_a_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LUPICollator(tokenizer)
    collator = PromptCollator(tokenizer)
    for row in ({"prompt": [user("Hi")]}, {"messages": [user("Hi"), assistant("Hello")]}):
        with pytest.raises(ValueError, match="no chat template"):
            collator.encode(row)
    assert collator.encode({"prompt": "Hi"})["student_prompt_ids"] == tokenizer("Hi")["input_ids"]


# ---------------------------------------------------------------------------------------------------------- one prompt


def test_text_prompts_are_tokenized_as_they_are(tokenizer):
    batch = PromptCollator(tokenizer)([{"prompt": sentence} for sentence in SENTENCES[:3]])
    expected = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES[:3]]
    assert unpadded(batch, "student_prompt") == unpadded(batch, "teacher_prompt") == expected
    assert batch["student_prompt_mask"][:, -1].all()
    assert "completion_ids" not in batch


def test_message_prompts_go_through_the_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), user("Who ran?")]
    expected = chat(tokenizer, *messages)
    collator = PromptCollator(tokenizer)
    for row in ({"prompt": messages}, {"messages": messages}):
        found = collator.encode(row)
        assert found == {"student_prompt_ids": expected, "teacher_prompt_ids": expected, "completion_ids": []}
    answered = [*messages, assistant("The dog.")]
    whole = chat(tokenizer, *answered, generate=False)
    for row in ({"prompt": messages, "completion": answered[-1:]}, {"messages": answered}):
        found = collator.encode(row)
        assert found["student_prompt_ids"] == found["teacher_prompt_ids"] == expected
        assert expected + found["completion_ids"] == whole
        assert tokenizer.decode(found["completion_ids"]) == "The dog.<eos>"


@pytest.mark.parametrize("make", [make_tokenizer, make_bos_tokenizer])
def test_completions_are_tokenized_as_they_follow_their_prompt(make):
    tokenizer = make()
    collator, jointly = PromptCollator(tokenizer), []
    for sentence in SENTENCES[:2]:
        for cut in range(1, len(sentence)):
            prompt, completion = sentence[:cut], sentence[cut:]
            found = collator.encode({"prompt": prompt, "completion": completion})
            alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            joint = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            separate = tokenizer(completion, add_special_tokens=False)["input_ids"]
            jointly.append(joint[: len(alone)] == alone)
            bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            assert found["student_prompt_ids"] == found["teacher_prompt_ids"] == bos + alone
            assert found["completion_ids"] == (joint[len(alone) :] if jointly[-1] else separate) + [EOS]
            assert tokenizer.decode(found["student_prompt_ids"] + found["completion_ids"]).endswith(sentence + "<eos>")
    assert {True, False} == set(jointly)


def test_a_completion_does_not_begin_like_a_text_of_its_own():
    """Many tokenizers put a space before a text; there is none inside of one."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = PromptCollator(tokenizer).encode({"prompt": "Who ran?", "completion": "(The dog.)"})
    assert tokenizer.decode(tokenizer("(The dog.)")["input_ids"]) == " (The dog.)"
    assert tokenizer.decode(found["student_prompt_ids"] + found["completion_ids"]) == " Who ran?(The dog.)<eos>"


@pytest.mark.parametrize("make", [make_tokenizer, make_bos_tokenizer])
def test_end_of_text_is_there_once(make):
    tokenizer = make()
    collator = PromptCollator(tokenizer)
    for completion in (" a fish.", " a fish.<eos>"):
        ids = collator.encode({"prompt": "The dog saw", "completion": completion})["completion_ids"]
        assert tokenizer.decode(ids) == " a fish.<eos>"
    found = collator.encode({"messages": [user("Who?"), assistant("A fish.")]})
    assert tokenizer.decode(found["completion_ids"]) == "A fish.<eos>"
    begins = "" if tokenizer.bos_token is None else "<bos>"
    assert tokenizer.decode(found["student_prompt_ids"]) == begins + "<|user|>Who?<eos><|assistant|>"


def test_an_end_of_text_that_a_prompt_has_itself_stays_in_it(tokenizer):
    """Earlier turns, or documents, may be separated by it."""
    prompt = "Who ran?<eos>"
    found = PromptCollator(tokenizer).encode({"prompt": prompt, "completion": "The dog."})
    assert found["student_prompt_ids"] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(found["completion_ids"]) == "The dog.<eos>"


@pytest.mark.parametrize("row", [{}, {"prompt": ""}, {"prompt": []}, {"prompt": None}, {"messages": []},
                                 {"messages": [assistant("Hello")]}, {"text": "Hi"}])  # fmt: skip
def test_rows_without_a_prompt_are_refused_by_name(tokenizer, row):
    with pytest.raises(ValueError, match="row 1 has no prompt"):
        PromptCollator(tokenizer)([{"prompt": "Hi"}, row])


# ------------------------------------------------------------------------------------------------------------- batches


def test_encoded_rows_are_only_padded(tokenizer, caplog):
    collator = LUPICollator(tokenizer, max_prompt_length=56)
    rows = [encoded(collator, row, i) for i, row in enumerate(ROWS)]
    count = sum(row["knowledge_truncated"] for row in rows)
    assert 0 < count < len(rows)
    for given in (ROWS, rows):  # encoded rows come from a stream: nobody else has counted them
        caplog.clear()
        batch = collator(given)
        assert f"the knowledge of {count} of {len(rows)} rows of the batch" in caplog.text
    caplog.clear()
    # As they come out of a data set, which has counted them and kept nothing but ids.
    ids = [{name: value for name, value in row.items() if name.endswith("_ids")} for row in rows]
    again = collator(ids)
    assert not caplog.records
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[name], value) for name, value in again.items())


def test_a_template_is_filled_in_everywhere_and_only_once(tokenizer):
    row = {"query": "Who {knowledge}?", "knowledge": "Tom {query}."}
    collator = LUPICollator(tokenizer, knowledge_template="{knowledge} {query} {knowledge}")
    found = tokenizer.decode(collator.encode(row)["teacher_prompt_ids"])
    assert found == "<|user|>Tom {query}. Who {knowledge}? Tom {query}.<eos><|assistant|>"


def test_what_is_no_text_is_named(tokenizer):
    row = {"query": "Who?", "knowledge": ["Tom.", "Ann."]}
    with pytest.raises(ValueError, match="'knowledge' of row 3 has to be text, got list"):
        LUPICollator(tokenizer).encode(row, "row 3")


def test_tools_and_template_arguments_reach_the_chat_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ style }}" + CHAT_TEMPLATE
    tools = [{"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}]
    row = {"prompt": [user("Who?")], "tools": tools, "chat_template_kwargs": {"style": "brief"}}
    ids = PromptCollator(tokenizer).encode(row)["student_prompt_ids"]
    assert tokenizer.decode(ids) == "searchbrief<|user|>Who?<eos><|assistant|>"


@pytest.mark.parametrize("form", ["text", "prompt", "messages"])
def test_a_teacher_prompt_is_for_the_teacher_alone(tokenizer, form):
    own = [{"role": "system", "content": "Be right."}, user(SENTENCES[0]), user("Who ran?")]
    row = {
        "text": {"prompt": "Who ran?", "completion": " The dog."},
        "prompt": {"prompt": [user("Who ran?")], "completion": [assistant("The dog.")]},
        "messages": {"messages": [user("Who ran?"), assistant("The dog.")]},
    }[form]
    plain = PromptCollator(tokenizer).encode(row)
    found = PromptCollator(tokenizer).encode({**row, "teacher_prompt": SENTENCES[0] if form == "text" else own})
    expected = tokenizer(SENTENCES[0])["input_ids"] if form == "text" else chat(tokenizer, *own)
    assert found == {**plain, "teacher_prompt_ids": expected}
    assert PromptCollator(tokenizer).encode({**row, "teacher_prompt": None}) == plain
    with pytest.raises(ValueError, match="'teacher_prompt' of row 3 have to be both text or both messages"):
        PromptCollator(tokenizer).encode({**row, "teacher_prompt": own if form == "text" else "So"}, "row 3")


def test_completions_are_given_only_where_all_rows_have_one(tokenizer):
    rows = [{"prompt": "The dog", "completion": " ran."}, {"prompt": "The bird sang"}]
    collator = PromptCollator(tokenizer)
    assert "completion_ids" not in collator(rows)
    assert collator(rows[:1])["completion_mask"].all()


def test_padding_is_the_end_of_text_where_there_is_no_other():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    rows = [
        {"student_prompt_ids": [5, 6], "teacher_prompt_ids": [7], "completion_ids": [8, 9, 1]},
        {"student_prompt_ids": [5], "teacher_prompt_ids": [7, 8, 9], "completion_ids": [1]},
    ]
    batch = pad_prompts(rows, tokenizer)
    assert batch["student_prompt_ids"].tolist() == [[5, 6], [EOS, 5]]
    assert batch["teacher_prompt_ids"].tolist() == [[EOS, EOS, 7], [7, 8, 9]]
    assert batch["completion_ids"].tolist() == [[8, 9, 1], [1, EOS, EOS]]
    assert batch["completion_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["teacher_prompt_mask"].tolist() == [[False, False, True], [True, True, True]]
