"""The client, the handshake and the trainer with a server that has the same model as this process.

The tests run with a stub, and with a real server where one is given (see conftest.py).
"""

import copy

import pytest
import torch
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer
from hf_distill.teachers.remote import RemoteTeacher
from tests.conftest import SENTENCES, make_model


@pytest.fixture(params=[20, -1], ids=["top-20", "whole"])
def teacher(request, server, tmp_path):
    """A teacher that has met the student's tokenizer."""
    args = KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, teacher_logprobs=request.param)
    teacher = RemoteTeacher([server.url], args, index=0)
    teacher.introduce(server.truth.tokenizer, server.truth.vocab_size)
    return teacher


def texts_of(server):
    return [server.truth.tokenizer(sentence)["input_ids"][:20] for sentence in SENTENCES[:3]]


def test_the_handshake_finds_what_the_server_can_do(server, teacher):
    assert (teacher.name, teacher.server.dialect.name) == (server.truth.name, "vLLM")
    assert teacher.version.startswith("vLLM 0.")
    assert teacher.num_positions == server.truth.max_model_len - 1
    assert teacher.num_entries == (server.truth.vocab_size if teacher.asked == -1 else 20)


def test_scores_are_those_of_the_model(server, teacher):
    texts = texts_of(server)
    for text, scores in zip(texts, teacher.server.score(texts, teacher.asked), strict=True):
        expected = server.truth.log_probs(text)[:-1]
        ids = torch.from_numpy(scores.ids).long()
        assert ids.shape == (len(text) - 1, teacher.num_entries)
        found = torch.from_numpy(scores.log_probs)
        torch.testing.assert_close(found, expected.gather(1, ids), atol=server.tolerance, rtol=0)
        # The least likely entry is at least as likely as all that are left out.
        left_out = expected.scatter(1, ids, -torch.inf).amax(1)
        assert (found.amin(1) >= left_out - server.tolerance).all()
        own = expected.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(scores.own), own, atol=server.tolerance, rtol=0)


def test_greedy_continuations_are_the_models(server, teacher):
    prompts = [text[:8] for text in texts_of(server)]
    found = teacher.server.generate(prompts, max_tokens=[1, 5, 9], temperature=0.0, seeds=[0, 1, 2])
    for prompt, length, ids in zip(prompts, (1, 5, 9), found, strict=True):
        for i, id in enumerate(ids):
            log_probs = server.truth.log_probs([*prompt, *ids[:i]])[-1]
            assert log_probs[id] >= log_probs.max() - server.tolerance
        assert len(ids) == length


def test_sampled_continuations_are_repeated_by_their_seed(server, teacher):
    prompts = [text[:8] for text in texts_of(server)]
    once, again, other = (
        teacher.server.generate(prompts, max_tokens=8, temperature=1.0, seeds=[seed, seed + 1, seed + 2])
        for seed in (7, 7, 70)
    )
    assert once == again
    assert once != other


@pytest.mark.slow
def test_training_with_the_whole_vocabulary_equals_local_training(server, tmp_path):
    tokenizer = copy.deepcopy(server.truth.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "max_length": 12, "dataloader_num_workers": 0, "temperature": 2.0, "teacher_logprobs": -1,
    }  # fmt: skip
    logs = []
    for name, teacher in (("remote", server.url), ("local", copy.deepcopy(server.truth.model))):
        mine = settings if name == "remote" else {k: v for k, v in settings.items() if k != "teacher_logprobs"}
        args = KDConfig(output_dir=str(tmp_path / name), **mine)
        student = make_model(seed=2, vocab_size=server.truth.vocab_size)
        rows = Dataset.from_dict({"text": SENTENCES * 2})
        trainer = KDTrainer(student, teacher, args, rows, processing_class=tokenizer)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 20
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
