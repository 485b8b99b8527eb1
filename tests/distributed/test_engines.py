"""Two processes under FSDP2, ZeRO-2 and ZeRO-3 do what one does, and their checkpoints and exports are whole."""

import pytest
import torch

from hf_distill import KDConfig
from hf_distill.planning.engines import share_of
from hf_distill.planning.models import parameter_shapes
from hf_distill.traffic import bytes_between_processes, bytes_for_rollouts
from hf_distill.trainers.checks import refuse_teacher_layouts
from tests.distributed.engine_runs import (
    CELLS,
    STUDENTS,
    TAUGHT,
    difference,
    launch,
    run_cell,
    saved_weights,
    taught_by_one,
)
from tests.distributed.engines import FOUND

ENGINES = ("fsdp2", "zero2", "zero3")
NAMES = ["-".join(cell) for cell in CELLS]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {cell: run_cell(cell, folder / "-".join(cell), 1) for cell in CELLS}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return taught_by_one(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module", params=ENGINES)
def two(request, tmp_path_factory):
    """The engine, its folder and the results of both processes."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install 'hf_distill[deepspeed]'")
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, launch(request.param, folder)


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_two_processes_make_the_update_of_one(one, two, cell):
    engine, _, results = two
    for rank in results:
        assert (rank[cell]["num_processes"], rank[cell]["engine"]) == (2, FOUND[engine])
        assert rank[cell]["before"].keys() == one[cell]["before"].keys()
        assert all(torch.equal(rank[cell]["before"][name], value) for name, value in one[cell]["before"].items())
        assert difference(rank[cell]["weights"], one[cell]["weights"], one[cell]["before"]) <= 1e-4


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_two_processes_log_and_evaluate_what_one_does(one, two, cell):
    names = {"loss", "kd", "ce", "num_tokens", "grad_norm", "kv/cosine", "rollout/tokens_accepted"}
    for rank in two[2]:
        for found, expected in zip(rank[cell]["logs"], one[cell]["logs"], strict=True):
            for name in names & expected.keys():
                assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name
        for name in {f"eval_{name}" for name in names} & one[cell]["eval"].keys():
            assert rank[cell]["eval"][name] == pytest.approx(one[cell]["eval"][name], rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(two, cell):
    for rank in two[2]:
        assert difference(rank[cell]["resumed"], rank[cell]["weights"], rank[cell]["before"]) <= 1e-4


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_the_whole_student_and_its_projector_are_saved(two, cell):
    _, folder, results = two
    found, expected = saved_weights(cell, folder / "-".join(cell)), results[0][cell]["weights"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
def test_a_mixture_of_experts_is_resumed_and_its_best_weights_loaded_bit_for_bit(tmp_path, engine):
    """Its checkpoints have other names than its modules."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install 'hf_distill[deepspeed]'")
    for rank in launch(engine, tmp_path, "mixtures"):
        for student, found in rank.items():
            assert found["engine"] == FOUND[engine]
            first, second = found["steps"]
            assert any(not torch.equal(first[name], value) for name, value in second.items())
            for name in second:
                assert torch.equal(found["resumed"][name], second[name]), (student, name)
                assert torch.equal(found["best"][name], first[name]), (student, name)


@pytest.mark.parametrize("case", TAUGHT, ids=map("-".join, TAUGHT))
def test_any_teachers_teach_two_processes_what_they_teach_one(taught, two, case):
    engine, _, results = two
    if engine == "zero2":
        return  # splits no weights
    expected = taught[case]
    for rank in results:
        shares = rank[case]["shares"]
        assert shares == pytest.approx([0.5 if case[2] == "sharded" else 1] * len(shares), abs=0.02)
        assert difference(rank[case]["weights"], expected["weights"], expected["before"]) <= 1e-4
        assert rank[case]["eval"]["eval_loss"] == pytest.approx(expected["eval"]["eval_loss"], rel=1e-5)


def test_routing_to_a_teacher_that_is_split_is_refused(tmp_path, monkeypatch):
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    args = KDConfig(str(tmp_path), bf16=False, teacher_device="sharded", teacher_combination="route")
    with pytest.raises(ValueError, match="has to be asked by all processes at once: take no 'route'"):
        refuse_teacher_layouts(args, has_base=False)


@pytest.mark.parametrize("cell", [("KDTrainer", "full"), ("KDTrainer", "lora")], ids=["full", "lora"])
def test_processes_keep_as_many_bytes_as_planned(two, cell):
    engine, _, results = two
    student, sgd = STUDENTS[cell[1]], (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    planned = share_of(
        engine, 2, parameter_shapes(student), sgd, mixed=False, layer=0, root=0,
        buffers=sum(buffer.nbytes for buffer in student.buffers()),
    )  # fmt: skip
    assert results[0][cell]["kept"]["weights"] == pytest.approx(planned.weights, rel=0.01)
    assert results[0][cell]["kept"]["optimizer"] == pytest.approx(planned.optimizer, rel=0.01)


@pytest.mark.parametrize("cell", [("KDTrainer", "full"), ("KDTrainer", "lora"), ("SpeculativeKDTrainer", "full")])
def test_processes_send_as_many_bytes_as_predicted(two, cell):
    engine, _, results = two
    found = results[0]["bytes", *cell]
    expected = bytes_between_processes(
        engine, 2, parameters=found["parameters"], trainable=found["trainable"], micro_batches=2, parameter_bytes=4,
        gradient_bytes=4, once=found["last"] if engine == "fsdp2" else found["first"] if cell[1] == "lora" else 0,
    )  # fmt: skip
    if cell[0] == "SpeculativeKDTrainer" and engine != "zero2":
        expected["weights"] += bytes_for_rollouts(2, found["parameters"], parameter_bytes=4)
    assert found["gather"] == pytest.approx(expected["weights"], rel=0.01)
    assert found["reduce"] == pytest.approx(expected["gradients"], rel=0.01)
