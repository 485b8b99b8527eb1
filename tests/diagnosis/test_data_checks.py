"""The checks of texts, tokens and rows: each finds one planted fault, and is silent without it."""

import copy

import pytest
from datasets import Dataset
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing

from hf_distill import SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.collators import LUPICollator
from hf_distill.diagnosis.findings import LeftOut
from tests.conftest import CHAT_TEMPLATE, SENTENCES, make_tokenizer

CHATS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": text.split()[0]},
                {"role": "assistant", "content": text},
            ]
        }
        for text in SENTENCES
    ]
)


def tokens(tokenizer, change):
    """Rows of token ids; `change` makes labels of them."""
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in SENTENCES]
    return Dataset.from_list([{"input_ids": row, "labels": change(row)} for row in ids])


@pytest.mark.parametrize(
    "check", ["EOS", "padding", "labels", "label share", "cut rows", "copies", "longest rows", "construction"]
)
def test_checks_of_the_data_are_silent_about_a_clean_run(examine, check):
    assert examine(check).status == "ok"


def test_a_doubled_bos_is_found(examine, tokenizer):
    beginning = copy.deepcopy(tokenizer)
    beginning.bos_token = "<eos>"
    beginning._tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    rows = Dataset.from_dict({"text": ["<eos>" + text for text in SENTENCES]})
    once = examine("BOS", processing_class=beginning)
    twice = examine("BOS", processing_class=beginning, train_dataset=rows)
    assert (once.status, twice.status) == ("ok", "warning")
    assert once.numbers["begun"] == twice.numbers["doubled"] == len(SENTENCES)


def test_ends_without_a_label_are_found(examine, tokenizer):
    masked = tokens(tokenizer, lambda ids: [*ids[:-1], -100])
    absent = Dataset.from_list([{"input_ids": row["input_ids"][:-1]} for row in masked])
    assert "it is masked" in examine("EOS", train_dataset=masked).line
    finding = examine("EOS", train_dataset=absent)
    assert finding.status == "warning"
    assert finding.numbers == {"texts": len(SENTENCES), "learned": 0, "masked": 0}


def test_labels_on_padding_are_found(examine, tokenizer):
    pad = tokenizer.pad_token_id
    rows = [row["input_ids"] + [pad] * 5 for row in tokens(tokenizer, list)]
    padded = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    assert examine("padding", train_dataset=padded).status == "failure"
    assert examine("EOS", train_dataset=padded).status == "ok"  # the end comes before the padding
    with pytest.raises(LeftOut, match="labels are not what the rows say"):
        examine("start", train_dataset=padded)
    masked = [{"input_ids": r, "labels": [-100 if i == pad else i for i in r]} for r in rows]
    assert examine("padding", train_dataset=Dataset.from_list(masked)).status == "ok"


def test_shifted_labels_are_found(examine, tokenizer):
    finding = examine("labels", train_dataset=tokens(tokenizer, lambda ids: [*ids[1:], -100]))
    assert finding.status == "failure"
    assert "shifted by one already" in finding.line


def test_the_share_of_labels_counts_rows_without_any(examine, tokenizer):
    half = tokens(tokenizer, list).map(
        lambda row, i: {"labels": row["labels"] if i % 2 else [-100] * len(row["labels"])}, with_indices=True
    )
    finding = examine("label share", train_dataset=half)
    assert finding.status == "warning"
    assert finding.numbers["without"] == 4
    prompted = Dataset.from_list([{"prompt": text, "completion": " Yes."} for text in SENTENCES])
    finding = examine("label share", train_dataset=prompted)
    lengths = [len(make_tokenizer()(text)["input_ids"]) for text in SENTENCES]
    assert finding.numbers["tokens"] - finding.numbers["labelled"] == sum(lengths)


@pytest.mark.parametrize(("max_length", "status"), [(4, "failure"), (18, "warning"), (60, "ok")])
def test_cut_labels_are_counted(examine, tokenizer, max_length, status):
    finding = examine("cut rows", settings={"max_length": max_length})
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in SENTENCES]
    assert finding.numbers["lost"] == sum(max(0, length - max_length) for length in lengths)
    assert finding.status == status


def test_copies_are_counted_whatever_their_spaces(examine):
    rows = SENTENCES + [text.upper().replace(" ", "  ") for text in SENTENCES[:4]]
    finding = examine("copies", train_dataset=Dataset.from_dict({"text": rows}))
    assert finding.status == "warning"
    assert finding.numbers["copies"] == 4


@pytest.mark.parametrize("knows", [False, True])
def test_rows_of_speculative_kd_are_copies_if_what_is_read_of_them_is(examine, tokenizer, knows):
    """Numbers of rows, and other columns that nobody reads, do not tell them apart."""
    texts = [*SENTENCES, *SENTENCES[:4]]
    rows = [{"id": i, "text": f"{i}", "query" if knows else "prompt": text[:20]} for i, text in enumerate(texts)]
    rows = [{**row, "knowledge": text[20:]} if knows else row for row, text in zip(rows, texts, strict=True)]
    changes = {"config": SpeculativeKDConfig, "settings": {"max_new_tokens": 4}, "processing_class": tokenizer}
    if knows:
        changes["data_collator"] = LUPICollator(tokenizer, query_column="query", knowledge_column="knowledge")
    held_out = Dataset.from_list([{**row, "id": 100 + i, "text": f"{i}"} for i, row in enumerate(rows[:2])])
    changes |= {"train_dataset": Dataset.from_list(rows), "eval_dataset": held_out}
    assert examine("copies", SpeculativeKDTrainer, **changes).numbers["copies"] == 4
    assert examine("held-out rows", SpeculativeKDTrainer, **changes).numbers["leaked"] == 2


def test_held_out_rows_in_the_training_set_are_found(examine):
    rows = {"text": ["Something else."] * 9 + [SENTENCES[0].lower()]}
    finding = examine("held-out rows", eval_dataset={"first": Dataset.from_dict(rows)})
    assert finding.status == "warning"
    assert finding.numbers["leaked"] == 1
    rows = {"text": ["Something else."]}
    assert examine("held-out rows", eval_dataset=Dataset.from_dict(rows)).status == "ok"
    with pytest.raises(LeftOut, match="no held-out rows"):
        examine("held-out rows")


def test_the_longest_rows_are_listed(examine, tokenizer):
    lengths = sorted((len(tokenizer(text)["input_ids"]) + 1 for text in SENTENCES), reverse=True)
    assert examine("longest rows").numbers["longest"] == lengths


def test_a_lost_system_prompt_is_found(examine, with_template):
    silent = with_template(CHAT_TEMPLATE.replace("in messages", "in messages if message['role'] != 'system'"))
    finding = examine("lost messages", train_dataset=CHATS, processing_class=silent)
    assert finding.status == "warning"
    assert finding.numbers == {"lost": len(CHATS), "roles": "system"}
    assert examine("lost messages", train_dataset=CHATS).status == "ok"
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    base = examine(
        "lost messages", train_dataset=CHATS, processing_class=silent, teacher_model="base", peft_config=lora
    )
    assert base.status == "warning"


def test_templates_are_compared_by_the_text_that_they_make(examine, with_template):
    loud = with_template(CHAT_TEMPLATE.replace("{{ message['content'] }}<eos>", "{{ message['content'] }}!<eos>"))
    finding = examine("chat templates", train_dataset=CHATS, teacher_processing_class=loud)
    assert finding.status == "warning"
    assert "!" in finding.line
    same = with_template(CHAT_TEMPLATE + "{# a comment #}")
    assert examine("chat templates", train_dataset=CHATS, teacher_processing_class=same).status == "ok"
    with pytest.raises(LeftOut, match="no conversations"):
        examine("chat templates", teacher_processing_class=same)


@pytest.mark.parametrize("alone", [True, False])
def test_generation_markers_tell_what_bears_labels(examine, alone):
    finding = examine("generation markers", train_dataset=CHATS, settings={"assistant_only_loss": alone})
    assert (finding.numbers["masked"] > 0) == alone


def test_another_vocabulary_is_told_from_some_renamed_ids(examine, folder, tokenizer):
    renamed = make_tokenizer(added_tokens=("<a>", "<b>"))
    mine = make_tokenizer(added_tokens=("<b>", "<a>"))
    finding = examine("vocabularies", processing_class=mine, teacher_processing_class=renamed)
    assert finding.status == "warning"
    assert "only 2 of" in finding.line
    other = make_tokenizer(corpus=[text[::-1] for text in SENTENCES])
    finding = examine("vocabularies", teacher_processing_class=other)
    assert finding.status == "ok"
    assert "texts are aligned" in finding.line
    assert examine("alignment", teacher_processing_class=other).numbers


def test_what_needs_a_trainer_is_left_out_without_one(examine):
    rows = Dataset.from_dict({"text": SENTENCES, "teacher_logits": [0] * len(SENTENCES)})
    finding = examine("construction", train_dataset=rows)
    assert finding.status == "failure"
    assert "teacher_logits" in finding.line
    with pytest.raises(LeftOut, match="there is no trainer"):
        examine("EOS", train_dataset=rows)
    assert examine("copies", train_dataset=rows).status == "ok"
