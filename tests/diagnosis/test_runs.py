"""Runs of many shapes are examined: no check stops, and none says of one what it cannot know."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers.utils import is_flash_attn_2_available

from hf_distill import KDConfig, KDTrainer, SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.collators import LUPICollator
from hf_distill.diagnosis import CHECKS, diagnose
from hf_distill.diagnosis.probe import open_probe
from hf_distill.diagnosis.updates import mean_loss, training
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import HardLabelConfig
from tests.conftest import SENTENCES, make_tokenizer

TEXTS = Dataset.from_dict({"text": SENTENCES})
PAIRS = Dataset.from_list([{"prompt": text[:9], "completion": text[9:]} for text in SENTENCES])
FACTS = Dataset.from_list([{"query": f"Where is {i}?", "knowledge": text} for i, text in enumerate(SENTENCES)])
LORA = LoraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture(autouse=True)
def without_plan(monkeypatch):
    """A plan takes longer than all else, and depends on little that is changed here."""
    monkeypatch.delitem(CHECKS, "memory")


def examined(run, trainer_class=KDTrainer, **changes):
    found = diagnose(trainer_class, num_rows=6, **run(**changes))
    assert [finding.line for finding in found.findings if "it stopped" in finding.line] == []
    assert found["construction"].status == "ok", found["construction"].line
    return found


def test_a_teacher_with_another_tokenizer_is_measured_on_the_text_that_both_read(run):
    other = make_tokenizer(corpus=[text[::-1] for text in SENTENCES])
    found = examined(run, teacher_processing_class=other)
    numbers = next(iter(found["teacher's perplexity"].numbers.values()))
    assert numbers["tokens"] > 0
    assert found["alignment"].status == "ok"
    assert found["start"].status == found["teacher's EOS"].status == "left out"


def test_each_of_several_teachers_is_measured(run, folder):
    teachers = {"one": str(folder / "teacher"), "two": str(folder / "student")}
    found = examined(run, teacher_model=teachers)
    assert list(found["start"].numbers) == ["one", "two"]
    assert found["start"].numbers["two"]["kl"] == pytest.approx(0, abs=1e-5)


def test_teachers_of_single_rows_are_not_asked_about_others(run, folder):
    teachers = {"one": str(folder / "teacher"), "two": str(folder / "student")}
    rows = TEXTS.add_column("teacher", ["one", "two"] * 4)
    found = examined(run, teacher_model=teachers, train_dataset=rows, settings={"teacher_combination": "route"})
    assert found["start"].status == "left out"
    assert "teacher of its own" in found["start"].line


def test_the_base_model_is_a_teacher_at_no_distance(run):
    found = examined(run, teacher_model="base", peft_config=LORA)
    assert next(iter(found["start"].numbers.values()))["kl"] == pytest.approx(0, abs=1e-5)
    assert found["LoRA"].status == "ok"


@pytest.mark.parametrize(
    "settings",
    [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}, {"hidden_weight": 1.0}],
)
def test_settings_of_the_trainer_are_followed(run, settings):
    examined(run, settings=settings, train_dataset=PAIRS)


def test_a_text_of_the_teachers_own_is_what_the_teacher_reads(run):
    rows = PAIRS.add_column("teacher_prompt", [f"Read: {text} " for text in SENTENCES])
    found = examined(run, train_dataset=rows)
    assert found["start"].numbers != examined(run, train_dataset=PAIRS)["start"].numbers


def test_a_stream_is_examined_by_its_first_rows(run):
    found = examined(run, train_dataset=TEXTS.to_iterable_dataset(), settings={"max_steps": 10})
    assert found["label share"].status == "ok"
    assert found["copies"].status == "ok"


def test_token_ids_that_are_not_prepared_are_examined(run, tokenizer):
    rows = [tokenizer(text)["input_ids"] + [1] for text in SENTENCES]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    assert examined(run, train_dataset=rows, settings=settings)["EOS"].status == "ok"


def test_hard_labels_have_no_teacher_to_examine(run):
    arguments = run(config=HardLabelConfig)
    del arguments["teacher_model"]
    found = diagnose(HardLabelTrainer, num_rows=6, **arguments)
    assert found["teacher's perplexity"].line == "the run has no teacher"
    assert found["learning rate"].numbers
    assert [finding.line for finding in found.findings if "it stopped" in finding.line] == []


def test_knowledge_of_the_teacher_is_read_by_it_alone(run, tokenizer):
    settings = {"max_new_tokens": 4}
    collator = LUPICollator(tokenizer, query_column="query", knowledge_column="knowledge")
    changes = {"config": SpeculativeKDConfig, "data_collator": collator, "processing_class": tokenizer}
    found = examined(run, SpeculativeKDTrainer, train_dataset=FACTS, settings=settings, **changes)
    assert found["start"].numbers


def test_losses_are_those_of_the_run_in_its_precision(run, tmp_path):
    """The first loss that a run logs, of the same rows, is that of the probe; bfloat16 rounds both alike."""
    found = {}
    for bf16 in (False, True):
        settings = {"bf16": bf16, "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1}
        arguments = run(settings={**settings, "save_strategy": "no", "output_dir": str(tmp_path)})
        with open_probe(KDTrainer, arguments, 8) as probe, training(probe):
            found[bf16] = mean_loss(probe, list(probe.batches(8, packed=True)))
        trainer = KDTrainer(**arguments)
        trainer.train()
        assert found[bf16] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)
    assert found[True] != found[False]


def test_a_scheduled_loss_is_examined_at_its_end(run):
    examined(run, settings={"schedule": {"temperature": [2, 1]}})


def test_the_cost_of_8_bits_is_measured_under_adapters(run):
    pytest.importorskip("bitsandbytes")
    found = examined(run, settings={"teacher_quantization": "8bit"}, peft_config=LORA)
    assert found["cost of bits"].numbers["kl"] > 0


def test_a_model_that_is_no_model_is_one_failure(run, folder):
    arguments = run(model=str(folder / "rows.jsonl"))
    found = diagnose(KDTrainer, num_rows=6, **arguments)
    assert [finding.check for finding in found.with_status("failure")] == ["construction"]


def test_a_package_that_is_not_installed_is_one_failure(run):
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    settings = {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
    found = diagnose(KDTrainer, num_rows=6, **run(settings=settings))
    assert [finding.check for finding in found.with_status("failure")] == ["construction"]


def test_a_run_without_training_rows_is_one_failure(run):
    found = diagnose(KDTrainer, num_rows=6, **run(train_dataset=None))
    assert [finding.check for finding in found.with_status("failure")] == ["construction"]
    assert found["copies"].line == "there are no training rows"
    assert [finding.line for finding in found.findings if "it stopped" in finding.line] == []


def test_an_error_within_one_check_leaves_that_check_out(run, monkeypatch):
    def stopping(error):
        def stops(probe):
            raise error

        return stops

    errors = [KeyError("layer"), TypeError("one too many"), IndexError("too far"), ImportError("no such package")]
    monkeypatch.setattr("hf_distill.diagnosis.CHECKS", {str(error): stopping(error) for error in errors})
    found = diagnose(KDTrainer, num_rows=6, **run())
    for error, finding in zip(errors, found.findings, strict=True):
        assert finding.status == "left out"
        assert type(error).__name__ in finding.line


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setattr(KDConfig, "world_size", 2)
    with pytest.raises(ValueError, match="one process"):
        diagnose(KDTrainer, **run())
