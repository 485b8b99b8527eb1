"""Every term of the loss is in the log, and with the weights of the settings they sum to the loss."""

import pytest
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.trainers.test_kd import settings

TEXTS = Dataset.from_dict({"text": [text[: 20 + 9 * i] for i, text in enumerate(SENTENCES)]})
PAIRS = Dataset.from_dict({"prompt": [text[:12] for text in SENTENCES], "completion": [t[12:] for t in SENTENCES]})
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 384,
    "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
MIX = {"speculative": 0.4, "student": 0.2, "teacher": 0.2, "dataset": 0.2}
CASES = {
    "kd": (KDTrainer, {}),
    "total variation": (KDTrainer, {"divergence": "total_variation"}),
    "hidden layers": (KDTrainer, {"hidden_weight": 0.3}),
    "hidden layers, packed": (KDTrainer, {"hidden_weight": 0.3, "packing": True, "max_length": 48}),
    "schedules": (KDTrainer, {"hidden_weight": 1.0, "schedule": {"kd_weight": [1, 0], "hidden_weight": [0.2, 2]}}),
    "another tokenizer": (KDTrainer, {"cross_tokenizer": "aligned"}),
    "uld": (KDTrainer, {"cross_tokenizer": "uld"}),
    "load balancing": (KDTrainer, {"router_aux_loss_coef": 0.5}),
    "keys and values": (KVProjectionTrainer, {"kv_weight": 3.0}),
    "keys and values, hidden layers": (KVProjectionTrainer, {"kv_loss": "mse", "hidden_weight": 0.1}),
    "keys and values, mlp": (KVProjectionTrainer, {"projector": "mlp"}),
    "a schedule of keys and values": (KVProjectionTrainer, {"schedule": {"kv_weight": [2, 0.5]}}),
    "speculative": (SpeculativeKDTrainer, {"kd_weight": 1.0}),
    "all sources": (SpeculativeKDTrainer, {"rollout_mix": MIX}),
}  # fmt: skip


def make(case, folder, **changes):
    trainer, options = CASES[case]
    config = {KDTrainer: KDConfig, KVProjectionTrainer: KVProjectionConfig, SpeculativeKDTrainer: SpeculativeKDConfig}
    more = {"max_new_tokens": 6, "draft_length": 2, "max_length": None} if trainer is SpeculativeKDTrainer else {}
    more |= {"kd_weight": 0.7, "temperature": 2.0, "max_steps": 3, "per_device_train_batch_size": 2}
    more |= {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0.01}
    rows, tokenizer, own = PAIRS if trainer is SpeculativeKDTrainer else TEXTS, make_tokenizer(), make_tokenizer()
    teacher = make_model(seed=5, hidden_size=48)
    if "cross_tokenizer" in options:
        own, teacher = make_tokenizer(vocab_size=320, corpus=SENTENCES[::2]), make_model(seed=5, vocab_size=320)
    student = make_model(seed=4)
    if "router_aux_loss_coef" in options:
        student = MixtralForCausalLM(MixtralConfig(**SIZES))
    args = config[trainer](**settings(folder, **{**more, **options, **changes}))
    return trainer(student, teacher, args, rows, rows, tokenizer, teacher_processing_class=own)


def weighted_sum(log: dict[str, float], args, prefix: str = "") -> float:
    """The loss as the documentation has it, of the terms in a log."""

    def weight(name):
        at_the_end = (args.schedule or {}).get(name, [getattr(args, name, 0.0)])[-1]
        return at_the_end if prefix else log.get(f"schedule/{name}", at_the_end)

    def term(name):
        return log.get(prefix + name, 0.0)

    uses_t_squared = args.divergence != "total_variation" and args.cross_tokenizer != "uld"
    factor = args.temperature**2 if uses_t_squared else args.temperature
    hard = log.get(f"{prefix}rollout/hard_label_fraction", 1.0)
    return (
        weight("kd_weight") * factor * term("kd")
        + (1 - weight("kd_weight")) * hard * term("ce")
        + weight("hidden_weight") * term("hidden")
        + weight("kv_weight") * term("kv")
        + (args.router_aux_loss_coef or 0.0) * term("aux_loss")
    )


@pytest.mark.parametrize("case", CASES)
def test_the_logged_terms_sum_to_the_loss(case, tmp_path):
    trainer = make(case, tmp_path)
    trainer.train()
    updates = [log for log in trainer.state.log_history if "loss" in log]
    assert len(updates) == 3
    for log in updates:
        assert log["loss"] == pytest.approx(weighted_sum(log, trainer.args), rel=1e-5, abs=1e-5)
    (held_out,) = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert held_out["eval_loss"] == pytest.approx(weighted_sum(held_out, trainer.args, "eval_"), rel=1e-5, abs=1e-5)
    expected = {"hidden layers": "hidden", "load balancing": "aux_loss", "keys and values": "kv"}
    assert case not in expected or updates[0][expected[case]] > 0
