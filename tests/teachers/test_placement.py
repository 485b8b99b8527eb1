"""Where teachers go: the arithmetic of devices for machines that need not be here, and offloading on this one."""

import copy

import pytest
import torch

from hf_distill.teachers.loading import load_teacher
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.placement import teacher_devices
from tests.conftest import make_model

GPUS = [f"cuda:{i}" for i in range(8)]


def devices_of(setting, num_ranks, gpus=GPUS):
    return [teacher_devices(setting, f"cuda:{rank}", rank, num_ranks, gpus) for rank in range(num_ranks)]


def test_by_default_each_teacher_is_beside_its_student():
    assert devices_of(None, 3) == [["cuda:0"], ["cuda:1"], ["cuda:2"]]
    assert teacher_devices(None, "cpu") == ["cpu"]


def test_a_device_is_what_it_says():
    assert devices_of("cuda:7", 2) == [["cuda:7"], ["cuda:7"]]
    assert teacher_devices("cpu", "cuda:0", devices=GPUS) == ["cpu"]


def test_paired_teachers_have_the_second_half_of_the_devices():
    assert devices_of("paired", 4) == [["cuda:4"], ["cuda:5"], ["cuda:6"], ["cuda:7"]]
    assert devices_of("paired", 1, GPUS[:2]) == [["cuda:1"]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_auto_gives_every_free_device_to_exactly_one_teacher(num_ranks):
    found = devices_of("auto", num_ranks)
    assert sorted(device for devices in found for device in devices) == GPUS[num_ranks:]
    sizes = [len(devices) for devices in found]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("setting", ["paired", "auto"])
def test_machines_without_a_free_device_are_refused(setting):
    for num_ranks, gpus in ((8, GPUS), (1, GPUS[:1]), (1, [])):
        with pytest.raises(ValueError, match=rf"teacher_device='{setting}'.*'offload'"):
            devices_of(setting, num_ranks, gpus)


def test_offloaded_teacher_keeps_no_weight_on_the_device_and_says_the_same(tmp_path):
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 380, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    model = make_model(seed=1)
    model.save_pretrained(tmp_path)
    expected = LocalTeacher(copy.deepcopy(model), torch.device("cpu"))(inputs, torch.arange(11))
    for given in (model, str(tmp_path)):
        teacher = LocalTeacher(load_teacher(given, device="offload", student_device="cpu"), torch.device("cpu"))
        assert all(parameter.is_meta for parameter in teacher.model.parameters())
        found = teacher(inputs, torch.arange(11))
        assert torch.equal(found.hidden, expected.hidden)
        assert torch.equal(found.head.weight, expected.head.weight)
        assert all(parameter.is_meta for parameter in teacher.model.parameters())


def test_offloaded_teacher_can_have_a_tied_head():
    model = make_model("qwen2", seed=1)
    weight = model.lm_head.weight.clone()
    teacher = LocalTeacher(load_teacher(model, device="offload"), torch.device("cpu"))
    assert torch.equal(teacher.head.weight, weight)


def test_offloading_and_quantisation_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="teacher_quantization='4bit' and teacher_device='offload' exclude each other"):
        load_teacher("no/teacher", device="offload", quantization="4bit")


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match=r"teacher_device='moon' is not a device of this machine.*paired"):
        load_teacher(make_model(), device="moon")


def test_head_of_an_offloaded_teacher_is_probed_too():
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="does not compute its logits"):
        LocalTeacher(load_teacher(model, device="offload"), torch.device("cpu"))
