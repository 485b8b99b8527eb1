"""EnsembleTeacher and BaseTeacher: each position hears the teachers it should, and nobody is changed by asking.

Shapes: B batch, T tokens, N positions, V vocabulary.
"""

from typing import get_args, get_type_hints

import pytest
import torch
from peft import FourierFTConfig, IA3Config, LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import nn

from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.local import BaseTeacher, LocalTeacher
from tests.conftest import make_model

CPU = torch.device("cpu")


class Listening(LocalTeacher):
    """A teacher that keeps the rows (B, T) that it is asked about."""

    def __init__(self, model):
        super().__init__(model, CPU)
        self.asked = []

    def __call__(self, inputs, positions):
        self.asked.append(inputs["input_ids"])
        return super().__call__(inputs, positions)


@pytest.fixture
def teachers():
    """Three teachers of different widths and families."""
    sizes = {"small": ("llama", 32), "wide": ("gemma2", 48), "gpt": ("gpt2", 32)}
    return {
        name: Listening(make_model(family, seed=i, hidden_size=width))
        for i, (name, (family, width)) in enumerate(sizes.items())
    }


@pytest.fixture
def batch():
    """Five ragged rows, padded to (5, 9), and positions (N,) of which rows 1 and 4 have one and none."""
    torch.manual_seed(0)
    lengths = torch.tensor([9, 4, 7, 5, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(2, 384, (5, 9)) * mask, "attention_mask": mask}
    chosen = torch.zeros(5, 9, dtype=torch.bool)
    chosen[0, 3:8] = chosen[1, 2:3] = chosen[2, 1:6] = chosen[3, :4] = True
    return inputs, chosen.flatten().nonzero().squeeze(1)


def logits_alone(model, inputs, positions):
    """The model's own logits (N, V), each row read alone and without padding."""
    logits = torch.zeros(*inputs["input_ids"].shape, 384)
    with torch.no_grad():
        for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
            length = int(mask.sum())
            logits[row, :length] = model(input_ids=ids[None, :length]).logits[0]
    return logits.flatten(0, 1)[positions]


# ----------------------------------------------------------------------------------------------- everybody everywhere


def test_signals_are_each_teachers_own_with_weights_that_sum_to_one(teachers, batch):
    signals = EnsembleTeacher(teachers, [1.0, 2.0, 5.0])(*batch).signals
    assert [signal.weight for signal in signals] == [0.125, 0.25, 0.625]
    for signal, teacher in zip(signals, teachers.values(), strict=True):
        assert torch.allclose(signal.head.logits(signal.hidden), logits_alone(teacher.model, *batch), atol=1e-4)
    assert [signal.weight for signal in EnsembleTeacher(teachers)(*batch).signals] == [1 / 3] * 3


def test_a_teacher_without_weight_is_not_asked(teachers, batch):
    ensemble = EnsembleTeacher(teachers, [0.0, 2.0, 0.0])
    ((hidden, _, weight, *_),) = ensemble(*batch).signals
    assert weight == 1
    assert hidden.shape[1] == 48
    assert [len(teacher.asked) for teacher in teachers.values()] == [0, 1, 0]
    assert ensemble.name == "0 small + 1 wide + 0 gpt"


# -------------------------------------------------------------------------------------------------- to each row its own


@pytest.mark.parametrize("index", [[0, 1, 2, 0, 1], [2, 2, 2, 2, 2], [1, 0, 0, 1, 2], [0, 2, 2, 2, 1]])
def test_each_row_hears_its_own_teacher_and_no_other_reads_it(teachers, batch, index):
    inputs, positions = batch
    signals = EnsembleTeacher(teachers, combination="route")(
        {**inputs, "teacher_index": torch.tensor(index)}, positions
    ).signals
    names = [name for i, name in enumerate(teachers) if i in index]
    assert len(signals) == len(names)
    for name, signal in zip(names, signals, strict=True):
        number = list(teachers).index(name)
        mine = torch.tensor(index)[positions // 9] == number
        assert torch.equal(signal.weight, mine.float())
        expected = logits_alone(teachers[name].model, *batch)[mine]
        assert torch.allclose(signal.head.logits(signal.hidden[mine]), expected, atol=1e-4)
    for i, teacher in enumerate(teachers.values()):
        asked = torch.cat(teacher.asked) if teacher.asked else torch.empty(0, 9, dtype=torch.long)
        assert torch.equal(asked, inputs["input_ids"][torch.tensor(index) == i])


def test_the_order_of_rows_and_positions_does_not_matter(teachers, batch):
    inputs, positions = batch
    inputs = {**inputs, "teacher_index": torch.tensor([0, 1, 2, 0, 1])}
    ensemble = EnsembleTeacher(teachers, combination="route")
    expected = ensemble(inputs, positions).signals
    order, shuffled = torch.tensor([3, 0, 4, 2, 1]), torch.randperm(len(positions))
    moved = {name: tensor[order] for name, tensor in inputs.items()}
    where = order.argsort()[positions // 9] * 9 + positions % 9
    for found, signal in zip(ensemble(moved, where[shuffled]).signals, expected, strict=True):
        assert torch.equal(found.weight, signal.weight[shuffled])
        assert torch.allclose(found.hidden, signal.hidden[shuffled], atol=1e-5)


def test_rows_without_positions_give_signals_without_rows(teachers, batch):
    inputs = {**batch[0], "teacher_index": torch.tensor([0, 1, 2, 0, 1])}
    signals = EnsembleTeacher(teachers, combination="route")(inputs, torch.tensor([], dtype=torch.long)).signals
    assert [tuple(signal.hidden.shape) for signal in signals] == [(0, 32), (0, 48), (0, 32)]
    assert [tuple(signal.weight.shape) for signal in signals] == [(0,)] * 3
    assert set(inputs) == {"input_ids", "attention_mask", "teacher_index"}  # as it was


def test_names_say_the_weights_or_none(teachers):
    assert EnsembleTeacher(teachers, [1, 1, 2]).name == "0.25 small + 0.25 wide + 0.5 gpt"
    assert EnsembleTeacher(teachers, combination="route").name == "small + wide + gpt"


# ----------------------------------------------------------------------------------------------- the student's own base


def adapted(family: str = "llama", *, config=None, **changes):
    """A student with LoRA that says something else than its base, and that base, untouched."""
    base = make_model(family, **changes)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5, **(config or {})}
    student = get_peft_model(make_model(family, **changes), LoraConfig(**config))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return student.eval(), base


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_base_teacher_says_what_the_base_says_and_the_student_then_what_it_said_before(family, batch):
    student, base = adapted(family)
    teacher, before = BaseTeacher(student), logits_alone(student, *batch)
    hidden, head, *_ = teacher(*batch)
    expected = logits_alone(base, *batch)
    assert torch.allclose(head.logits(hidden), expected, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-1)
    assert torch.equal(logits_alone(student, *batch), before)
    assert teacher.name == f"{type(base).__name__} without adapters"


def test_base_teacher_takes_no_memory(batch):
    student, _ = adapted()
    count = sum(parameter.numel() for parameter in student.parameters())
    teacher = BaseTeacher(student)
    _, head, *_ = teacher(*batch)
    assert head.weight.data_ptr() == student.get_base_model().lm_head.weight.data_ptr()
    assert teacher.model is student
    assert sum(parameter.numel() for parameter in student.parameters()) == count


def test_base_teacher_leaves_modes_gradients_and_random_numbers_as_they_were(batch):
    student, base = adapted("llama", attention_dropout=0.5)
    student.get_base_model().gradient_checkpointing_enable()
    student.train()
    student.base_model.model.model.layers[1].eval()  # somebody's own arrangement
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # LoRA-FA trains one half
    modes = {name: module.training for name, module in student.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    hidden, head, *_ = BaseTeacher(student)(*batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in student.named_parameters()} == trained
    assert student.get_base_model().model.gradient_checkpointing
    assert torch.allclose(head.logits(hidden), logits_alone(base, *batch), atol=1e-4)
    assert not hidden.requires_grad


def test_adapters_are_on_again_after_an_error(batch):
    student, _ = adapted()
    before = logits_alone(student, *batch)
    with pytest.raises(IndexError):
        BaseTeacher(student)(batch[0], torch.tensor([10**6]))
    assert torch.equal(logits_alone(student, *batch), before)
    assert any(parameter.requires_grad for parameter in student.parameters())


def test_base_teacher_gives_the_inner_layers_asked_for(batch):
    student, base = adapted()
    teacher = BaseTeacher(student)
    teacher.layers = (0, 1)
    *_, layers = teacher(*batch)
    expected = base(**batch[0], output_hidden_states=True).hidden_states
    for layer in (0, 1):
        assert torch.allclose(layers[layer], expected[layer + 1].flatten(0, 1)[batch[1]], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "trained"), [({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save"), ({"bias": "all"}, "bias")]
)
def test_student_whose_base_is_trained_has_none_that_could_teach(config, trained):
    student, _ = adapted("phi", config=config)
    with pytest.raises(ValueError, match=rf"stays as it is, but .*{trained}.* is trained: remove modules_to_save"):
        BaseTeacher(student)


# The values of `init_lora_weights` that can be tried without data and without a GPU.
STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "pissa_niter_4", "olora")
START = {
    **{str(init): {"init_lora_weights": init} for init in STARTS},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": KasaConfig()},
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("case", START)
def test_base_teacher_is_refused_where_the_start_of_the_adapters_changes_the_base(tmp_path, batch, case, loaded):
    base = make_model()
    student = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **START[case]))
    if loaded:
        student.save_pretrained(tmp_path)
        student = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    with student.disable_adapter():
        change = (logits_alone(student.eval(), *batch) - logits_alone(base, *batch)).abs().max()
    if change == 0:
        BaseTeacher(student)
        return
    assert change > 1e-2
    with pytest.raises(ValueError, match=r"(kasa_config|init_lora_weights='\w+') changes its weights .*pass the base"):
        BaseTeacher(student)


def test_each_start_that_peft_names_is_known():
    """A new one has to be tried here, and with `refuse_unrepeatable`."""
    _, names = get_args(get_type_hints(LoraConfig)["init_lora_weights"])
    tried = {str(init).replace("_4", "_[number of iters]") for init in STARTS} - {"True", "False"}
    assert set(get_args(names)) == tried | {"corda", "loftq"}


@pytest.mark.parametrize("config", [FourierFTConfig(n_frequency=8), IA3Config(), VBLoRAConfig(vector_length=4)])
def test_adapters_of_other_kinds_leave_the_base_that_teaches(batch, config):
    config.target_modules = {"q_proj", "v_proj"}
    student, base = get_peft_model(make_model(), config).eval(), make_model()
    hidden, head, *_ = BaseTeacher(student)(*batch)
    assert torch.allclose(head.logits(hidden), logits_alone(base, *batch), atol=1e-4)


def test_student_without_adapters_has_no_base():
    with pytest.raises(ValueError, match=r"'base' needs a student with adapters: pass a peft_config"):
        BaseTeacher(make_model())
