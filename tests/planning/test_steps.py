"""Components of a planned step, against a real step on the CPU: bytes of gradients, states and caches, and the peak."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.modeling import CachedReader, causal_lm, expose_hidden_states, select_positions
from hf_distill.planning.models import ModelSpec
from hf_distill.planning.rollouts import WritingRun, rollout_memory
from hf_distill.planning.steps import Batch, SignalSpec, StudentRun, student_step, teacher_forward
from hf_distill.speculative import RolloutConfig
from tests.conftest import make_model
from tests.planning.peaks import second_peak

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "fused adamw": (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3}),
    "momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-3}),
}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
WIDTH, ROWS, LENGTH = 48, 2, 64


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder with a configuration, and a function that makes the real model."""
    folder = tmp_path_factory.mktemp("student")
    make = lambda: make_model("llama", hidden_size=128, intermediate_size=256)  # noqa: E731
    make().config.save_pretrained(folder)
    return str(folder), make


def run_of(folder, **changes):
    batch = Batch(ROWS, LENGTH, ROWS * (LENGTH - 1))
    options = {
        "model": ModelSpec(folder, "float32"), "batch": batch,
        "signals": (SignalSpec("dense", WIDTH, 384, torch.float32),),
        "objective": Objective(kd_weight=0.5, vocab_size=384, chunk_size=32, checked=True), "device": "cpu",
    }  # fmt: skip
    return StudentRun(**options | changes)


class Step:
    """A real micro-batch, as the trainer makes it."""

    def __init__(self, model, run):
        self.model = model.train()
        if run.checkpointing is not None:
            causal_lm(model).gradient_checkpointing_enable(run.checkpointing)
            if run.lora is not None:
                model.enable_input_require_grads()
        expose_hidden_states(causal_lm(model))
        self.objective = run.objective
        self.ids = torch.randint(2, 384, (ROWS, LENGTH))
        self.positions = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[:, :-1].flatten()
        self.labels = self.ids[:, 1:].flatten()
        self.head = Head(torch.randn(384, WIDTH))

    def __call__(self):
        signal = TeacherSignal(torch.randn(len(self.positions), WIDTH), self.head)

        def with_hidden(outputs, head):
            hidden = select_positions(outputs.last_hidden_state, self.positions)
            return signal.loss(hidden, head, self.labels, self.objective).loss

        self.model(input_ids=self.ids, with_hidden=with_hidden).backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_and_states_have_the_bytes_of_a_real_step(student, name):
    folder, make = student
    model = make()
    Step(model, run := run_of(folder, optimizer=OPTIMIZERS[name]))()
    cls, kwargs = OPTIMIZERS[name]
    optimizer = cls(model.parameters(), **kwargs)
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    found = student_step(run)
    assert found.optimizer == sum(tensor.nbytes for tensor in states)
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert found.trainable == found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_peak_of_a_step_is_that_of_the_profiler(student, lora, checkpointing):
    folder, make = student
    torch.manual_seed(0)
    run = run_of(folder, lora=lora, checkpointing=checkpointing)
    model = make() if lora is None else get_peft_model(make(), lora)
    assert student_step(run).peak.total == pytest.approx(second_peak(Step(model, run)), rel=0.2)


@pytest.mark.parametrize(("family", "in_slots"), [("llama", True), ("mistral", False)])
def test_caches_of_a_rollout_have_the_bytes_of_real_ones(family, in_slots, tmp_path):
    bytes_of, prompts, new = [], (120, 14), 20
    for side, length in zip(("student", "teacher"), prompts, strict=True):
        model = make_model(family, num_hidden_layers=3 if side == "teacher" else 2)
        model.config.save_pretrained(tmp_path / side)
        ids = torch.randint(2, 384, (2, length))
        reader = CachedReader(model, ids, torch.ones_like(ids), in_slots)
        reader.read(torch.randint(2, 384, (2, new - 1)))
        cache = reader._cache
        bytes_of.append(sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)))
    run = WritingRun(
        run_of(str(tmp_path / "student")), ModelSpec(str(tmp_path / "teacher")), RolloutConfig(new), 2, prompts
    )
    assert list(rollout_memory(run).caches) == bytes_of


def test_a_teacher_is_counted_without_its_head_and_with_inner_layers(tmp_path):
    make_model().config.save_pretrained(tmp_path)
    spec, batch = ModelSpec(str(tmp_path), "float32"), Batch(2, 16, 30)
    plain, inner = (teacher_forward(spec, batch, layers=layers, device="cpu") for layers in ((), (0,)))
    assert plain.weights == inner.weights
    assert inner.peak >= plain.peak
    # Of each token 2 FLOPs for each weight of the layers, and the attention's; the head is a part of the loss.
    layers = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    attention = 2 * 2 * 4 * 16 * 16 * 16
    # transformers 5.17 multiplies matrices for the angles of the positions, too.
    assert plain.flops == pytest.approx(2 * 32 * layers + 2 * attention, rel=2e-4)
