"""The warning of a collapse, in real training: the packaged teacher, a small random student, short stories."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import KVProjectionConfig, KVProjectionTrainer
from hf_distill.demo import TEACHER
from hf_distill.demo.text import stories
from tests.conftest import make_model

WARNING = "cosine of keys and values rose"


@pytest.fixture(scope="module")
def rows() -> tuple[Dataset, Dataset]:
    """96 rows of 48 tokens to train on, and 16 held-out ones."""
    ids = [row[:48] for row in AutoTokenizer.from_pretrained(TEACHER)(stories(112, seed=3))["input_ids"]]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return dataset.select(range(96)), dataset.select(range(96, 112))


def first_and_last_evaluation(folder, rows, **changes) -> tuple[dict[str, float], dict[str, float]]:
    """Of a run of 24 updates, evaluated before it, in the middle and at its end."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(TEACHER), AutoModelForCausalLM.from_pretrained(TEACHER)
    args = KVProjectionConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        disable_tqdm=True, save_strategy="no", learning_rate=1e-2, projector_learning_rate=1e-2, max_steps=24,
        per_device_train_batch_size=8, logging_strategy="no", eval_strategy="steps", eval_steps=12, eval_on_start=True,
        seed=0, **changes,
    )  # fmt: skip
    trainer = KVProjectionTrainer(
        make_model(seed=2, vocab_size=teacher.config.vocab_size), teacher, args, *rows, tokenizer,
        teacher_processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_kd" in log]
    return evaluations[0], evaluations[-1]


def test_a_run_on_keys_and_values_alone_collapses_and_is_warned_of(tmp_path, rows, caplog):
    """Beside such a weight nothing else matters: even AdamW, which knows no scale, makes no step of a 1e12th."""
    first, last = first_and_last_evaluation(tmp_path, rows, projector="mlp", kv_weight=1e12)
    assert last["eval_kv/cosine"] > 0.8
    assert last["eval_kv/cka"] < 0.2
    assert last["eval_kd"] > 0.99 * first["eval_kd"]
    assert caplog.text.count(WARNING) == 1


@pytest.mark.parametrize("changes", [{"projector": "pca"}, {"projector": "mlp", "kv_weight": 0.0}])
def test_a_run_that_learns_is_not_warned_of(tmp_path, rows, caplog, changes):
    first, last = first_and_last_evaluation(tmp_path, rows, **changes)
    assert last["eval_kd"] < 0.8 * first["eval_kd"]
    assert WARNING not in caplog.text
