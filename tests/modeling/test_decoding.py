"""A compiled step for all rows, against reading row by row without it."""

import pytest
import torch

from hf_distill.modeling import CachedReader, CompiledReader, CompiledStep
from hf_distill.modeling import decoding as module
from hf_distill.speculative import LocalVerifier, RolloutConfig, verified_rollout
from tests.conftest import make_model

EOS, PAD = 1, 0


@pytest.fixture
def not_compiled(monkeypatch):
    """Counts what would be compiled, and the shapes that it is called with."""
    shapes = []

    def compiled(forward, **_):
        def counting(**inputs):
            shapes.append(tuple(tuple(inputs[name].shape) for name in ("input_ids", "attention_mask")))
            return forward(**inputs)

        return counting

    monkeypatch.setattr(module.torch, "compile", compiled)
    return shapes


def prompts(lengths, seed=0):
    torch.manual_seed(seed)
    ids, width = torch.zeros(len(lengths), max(lengths), dtype=torch.long), max(lengths)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(2, 384, (length,))
        mask[row, width - length :] = 1
    return ids, mask


def written(student, teacher, lengths, step=None, **settings):
    config = RolloutConfig(**{"max_new_tokens": 12, "draft_length": 4, "top_k": 60, **settings})
    ids, mask = prompts(lengths, seed=len(lengths))
    reader = {} if step is None else {"make_reader": lambda *args: CompiledReader(*args, step=step)}
    with torch.no_grad():
        return verified_rollout(
            student, LocalVerifier(teacher, ids, mask, config, 384), ids, mask, config, eos_token_id=[EOS, 7, 9, 30],
            pad_token_id=PAD, vocab_size=384, generator=torch.Generator().manual_seed(3), **reader,
        )  # fmt: skip


BATCHES = [(3, 9, 5), (4,), (2, 11), (7, 1, 2), (1, 1)]


def assert_same_texts(student, teacher, step, **settings):
    for lengths in BATCHES:
        expected, found = (written(student, teacher, lengths, with_step, **settings) for with_step in (None, step))
        assert found.completion_ids.tolist() == expected.completion_ids.tolist()
        assert found.completion_mask.tolist() == expected.completion_mask.tolist()
        assert torch.allclose(found.evidence["hidden"], expected.evidence["hidden"], atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"adaptive": True, "student_temperature": 0.0}, {"draft_length": 12}])
def test_texts_are_those_without_the_step_and_shapes_never_change(settings, not_compiled):
    student, teacher = make_model(seed=2), make_model(seed=1)
    step = CompiledStep(student, rows=3, room=12, longest=11)
    assert_same_texts(student, teacher, step, **settings)
    assert set(not_compiled) == {((3, 1), (3, 1, 1, 128))}


def test_a_longer_prompt_makes_the_cache_longer_once(not_compiled):
    student, teacher = make_model(seed=2), make_model(seed=1)
    step = CompiledStep(student, rows=2, room=12)
    for lengths in ((5, 3), (120, 9), (4, 8)):
        expected, found = (written(student, teacher, lengths, with_step) for with_step in (None, step))
        assert found.completion_ids.tolist() == expected.completion_ids.tolist()
    assert list(dict.fromkeys(not_compiled)) == [((2, 1), (2, 1, 1, 128)), ((2, 1), (2, 1, 1, 256))]


def test_the_last_slots_are_enough_while_other_rows_draft_on(not_compiled):
    student, teacher = make_model(seed=2), make_model(seed=1)
    step = CompiledStep(student, rows=3, room=12, longest=115)  # 127 tokens and one slot for padding
    settings = {"student_temperature": 0.0, "teacher_temperature": 0.0, "top_k": 120}
    expected, found = (written(student, teacher, (115, 115, 115), each, **settings) for each in (None, step))
    assert found.completion_ids.tolist() == expected.completion_ids.tolist()
    assert set(not_compiled) == {((3, 1), (3, 1, 1, 128))}


def test_rows_that_have_ended_change_nothing_for_the_others(not_compiled):
    model = make_model()
    ids, mask = prompts((6, 2, 4))
    step = CompiledStep(model, rows=4, room=9)
    found, expected = CompiledReader(model, ids, mask, step), CachedReader(model, ids, mask)
    with torch.no_grad():
        for rows, counts in (((0, 2), (2, 0)), ((1,), (1,))):
            read = [reader.read(torch.full((len(reader.lengths), 2), 5))[:, -2:] for reader in (found, expected)]
            assert torch.allclose(*read, atol=1e-5)
            for reader in (found, expected):
                reader.rewind(*map(torch.tensor, (rows, counts, [8] * len(rows))))
            assert found.lengths.tolist() == expected.lengths.tolist()
            assert torch.allclose(*(reader.read()[:, -1] for reader in (found, expected)), atol=1e-5)


def test_a_model_with_windows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the student \(MistralForCausalLM\) cannot be compiled for rollouts"):
        CompiledStep(make_model("mistral"), rows=2, room=4)


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_and_is_compiled_once():
    student, teacher = make_model(seed=2), make_model(seed=1)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    step = CompiledStep(student, rows=3, room=12, longest=11)
    assert_same_texts(student, teacher, step)
    assert graphs["unique_graphs"] == 1
    with torch.no_grad():
        for parameter in student.parameters():  # an update
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    assert_same_texts(student, teacher, step, adaptive=True)
    assert graphs["unique_graphs"] == 1
