"""Runs with pictures are examined by the trainer's own batches of them, each side through its own processor."""

import base64
import io
import math

import pytest
from datasets import Dataset
from peft import LoraConfig

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer
from hf_distill.diagnosis import CHECKS, diagnose
from hf_distill.diagnosis.findings import LEFT_OUT
from hf_distill.diagnosis.forwards import compared
from hf_distill.diagnosis.probe import open_probe
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.planning import Machine, plan_run
from tests.vision import NEEDS_5_18, chats, make_processor, make_vlm, picture, questions

pytestmark = NEEDS_5_18

LEFT_OUT_HERE = {
    "alignment": "no teacher has another tokenizer",
    "chat templates": "rows with pictures have been read through both processors",
    "BOS": "the tokenizer has no BOS token",
    "held-out rows": "there are no held-out rows",
    "cost of bits": "no teacher is quantised here",
    "packing": "no row holds several texts",
    "LoRA": "the student is not trained in new adapters",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, and a teacher that cuts the same pictures into more tokens."""
    folder = tmp_path_factory.mktemp("seeing")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_vlm("idefics3", seed).save_pretrained(folder / name)
        make_processor("idefics3", do_image_splitting=name == "teacher").save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models, tmp_path):
    def make(settings=None, config=KDConfig, **changes):
        args = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 100,
            "per_device_train_batch_size": 4, "gradient_checkpointing": False, "learning_rate": 1e-3,
            "max_length": None,
        }  # fmt: skip
        arguments = {"model": str(models / "student"), "teacher_model": str(models / "teacher")}
        return {**arguments, "args": config(**{**args, **(settings or {})}), "train_dataset": chats(8), **changes}

    return make


@pytest.fixture
def examine(run):
    def find(check, **changes):
        with open_probe(KDTrainer, run(**changes), 16) as probe:
            probe.memory = 2**34
            return CHECKS[check](probe)

    return find


def as_stream(rows):
    return rows.to_iterable_dataset()


def beside_text(rows):
    """The same rows, some without a picture."""
    return rows.map(lambda row, i: {"images": row["images"] if i % 2 else []}, with_indices=True)


@pytest.mark.parametrize("rows", [chats(8), questions(8), as_stream(chats(8)), beside_text(chats(8))])
def test_no_check_stops_and_those_that_say_nothing_say_why(run, rows):
    found = diagnose(KDTrainer, num_rows=6, **run(train_dataset=rows))
    left_out = {each.check: each.line for each in found.with_status(LEFT_OUT)}
    has_answers = "completion" in (rows.column_names or ())
    expected = LEFT_OUT_HERE | ({"generation markers": "rows have prompts and completions"} if has_answers else {})
    assert left_out.keys() == expected.keys()
    assert [line for name, line in left_out.items() if not line.startswith(expected[name])] == []
    assert not found.fails
    assert found["split batches"].numbers["difference"] < 1e-5
    assert found["learning rate"].numbers["after"][2] < found["learning rate"].numbers["before"]


def test_predictions_are_those_of_evaluate_fidelity_each_side_on_its_own_view(run, models):
    with open_probe(KDTrainer, run({"per_device_eval_batch_size": 3}), 16) as probe:
        (sums,) = compared(probe).values()
    processors = make_processor("idefics3"), make_processor("idefics3", do_image_splitting=True)
    found = evaluate_fidelity(
        make_vlm("idefics3", 1), make_vlm("idefics3", 2), chats(8), processors[0],
        teacher_processing_class=processors[1],
    )  # fmt: skip
    assert sums.tokens == found["num_tokens"]
    assert math.exp(sums.student / sums.tokens) == pytest.approx(found["student_perplexity"], rel=1e-4)
    assert math.exp(sums.teacher / sums.tokens) == pytest.approx(found["teacher_perplexity"], rel=1e-4)
    for name, value in {"kl": sums.kl, "agreement": sums.agreement, "expected_acceptance": sums.acceptance}.items():
        assert value / sums.tokens == pytest.approx(found[name], rel=1e-4), name


def test_labels_and_pictures_are_counted_by_hand(examine):
    tokenizer = make_processor("idefics3").tokenizer
    rows = questions(6)
    answers = [len(tokenizer(row["completion"][0]["content"] + "<eos>")["input_ids"]) for row in rows]
    asked = [len(tokenizer(f"<|user|>{row['prompt'][0]['content']}<eos><|assistant|>")["input_ids"]) for row in rows]
    # Four placeholders, a mark around them on both sides, and one of the whole picture.
    assert examine("label share", train_dataset=rows).numbers == {
        "tokens": sum(answers) + sum(asked) + 6 * 7, "labelled": sum(answers), "without": 0, "pictures": 6 * 7,
        "share": sum(answers) / (sum(answers) + sum(asked) + 6 * 7),
    }  # fmt: skip
    lengths = [sum(sides) + 7 for sides in zip(answers, asked, strict=True)]
    assert examine("longest rows", train_dataset=rows).numbers["longest"] == sorted(lengths, reverse=True)
    cut = examine("cut rows", train_dataset=rows, settings={"max_length": 16})
    lost = [max(0, length - 16) for length in lengths]
    assert cut.numbers["lost"] == sum(min(each, answer) for each, answer in zip(lost, answers, strict=True)) > 0
    assert cut.numbers["dropped"] == sum(each >= answer for each, answer in zip(lost, answers, strict=True))
    assert "without a label" in cut.line


def test_another_picture_makes_another_row_whatever_the_form_of_both(examine, tmp_path):
    def address(seed):
        file = io.BytesIO()
        picture(seed).save(file, "PNG")
        return file.getvalue()

    messages = chats(1)[0]["messages"]
    for seed in (1, 2, 3):
        (tmp_path / f"{seed}.png").write_bytes(address(seed))
    paths = Dataset.from_list([{"image": str(tmp_path / f"{i}.png"), "messages": messages} for i in (1, 2, 1)])
    packed = [base64.b64encode(address(seed)).decode() for seed in (3, 2)]
    held_out = Dataset.from_list([{"image": each, "messages": messages} for each in packed])
    assert examine("copies", train_dataset=paths).numbers["copies"] == 1
    assert examine("held-out rows", train_dataset=paths, eval_dataset=held_out).numbers["leaked"] == 1
    lists = [[picture(1)], [picture(1), picture(2)], [picture(2), picture(1)]]
    rows = Dataset.from_list([{"images": each, "text": "<image>" * len(each)} for each in lists])
    assert examine("copies", train_dataset=rows).numbers["copies"] == 0


def test_a_message_that_the_processors_template_leaves_out_is_found(examine):
    silent = make_processor("idefics3")
    silent.chat_template = silent.chat_template.replace("in messages", "in messages if message['role'] != 'system'")
    system = [{"role": "system", "content": [{"type": "text", "text": "be short"}]}]
    rows = [{"images": row["images"], "messages": system + in_parts(row["messages"])} for row in chats(4)]
    changes = {"train_dataset": Dataset.from_list(rows), "teacher_model": make_vlm("idefics3", 2)}
    finding = examine("lost messages", processing_class=silent, **changes)
    assert finding.status == "warning"
    assert finding.numbers == {"lost": 4, "roles": "system"}
    assert examine("lost messages", **changes).status == "ok"


def in_parts(messages):
    parts = [[{"type": "image", "text": None}], []]
    return [
        {"role": each["role"], "content": [*part, {"type": "text", "text": each["content"]}]}
        for each, part in zip(messages, parts, strict=True)
    ]


def test_answers_alone_bear_labels_if_asked(examine):
    finding = examine("generation markers", settings={"assistant_only_loss": True})
    assert finding.line.startswith("the template marks what the assistant says")
    assert "every token of text bears a label" in examine("generation markers").line


def test_adapters_are_counted_in_the_language_part_alone(examine, run):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    finding = examine("LoRA", peft_config=lora)
    trainer = KDTrainer(**run(peft_config=lora))
    assert finding.numbers["trainable"] == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_the_memory_is_that_of_a_plan_with_the_pictures_of_the_rows(examine, run):
    finding, given = examine("memory"), run()
    counts = examine("label share").numbers
    plan = plan_run(
        given["model"], given["teacher_model"], given["args"], machine=Machine(2**34, reserve=0, kind="cpu"),
        row_tokens=examine("longest rows").numbers["longest"][0], picture_tokens=7, teacher_picture_tokens=34,
        label_share=counts["labelled"] / (counts["tokens"] - 8 * 7),
    )  # fmt: skip
    assert (finding.numbers["picture_tokens"], finding.numbers["teacher_picture_tokens"]) == (7, 34)
    assert finding.numbers["peak"] == plan.peak


def test_a_trainer_that_works_on_text_alone_is_one_failure(run):
    found = diagnose(KVProjectionTrainer, num_rows=4, **run(config=KVProjectionConfig))
    assert found["construction"].status == "failure"
    assert "KVProjectionTrainer works on text alone" in found["construction"].line
    assert found["copies"].status == "ok"
