"""Two processes under FSDP2, ZeRO-2 and ZeRO-3 do what one does, and their checkpoints and exports are whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.engine_runs import CELLS, run_cell, saved_weights

ENGINES = {"fsdp2": "FSDP, split", "zero2": "DEEPSPEED 2, whole", "zero3": "DEEPSPEED 3, split"}
NAMES = ["-".join(cell) for cell in CELLS]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {cell: run_cell(cell, folder / "-".join(cell), 1) for cell in CELLS}


@pytest.fixture(scope="module", params=ENGINES)
def two(request, tmp_path_factory):
    """The engine, its folder and the results of both processes."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install 'hf_distill[deepspeed]'")
    folder = tmp_path_factory.mktemp(request.param)
    script = Path(__file__).with_name("engine_runs.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), request.param, str(folder)],
        capture_output=True, text=True, timeout=400, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return request.param, folder, results


def assert_same_update(found: dict, expected: dict, before: dict, tolerance: float = 1e-4) -> None:
    """What two updates have added to the weights, not the weights, in which a wrong gradient would not be seen."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * (value - before[name]).norm() + 1e-6, name


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_two_processes_make_the_update_of_one(one, two, cell):
    engine, _, results = two
    for rank in results:
        assert (rank[cell]["num_processes"], rank[cell]["engine"]) == (2, ENGINES[engine])
        assert rank[cell]["before"].keys() == one[cell]["before"].keys()
        assert all(torch.equal(rank[cell]["before"][name], value) for name, value in one[cell]["before"].items())
        assert_same_update(rank[cell]["weights"], one[cell]["weights"], one[cell]["before"])


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
        assert_same_update(rank[cell]["resumed"], rank[cell]["weights"], rank[cell]["before"])


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_the_whole_student_and_its_projector_are_saved(two, cell):
    _, folder, results = two
    found, expected = saved_weights(cell, folder / "-".join(cell)), results[0][cell]["weights"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_teacher_can_be_split_as_the_student_is(one, two):
    engine, _, results = two
    if engine == "zero2":
        return  # splits no weights
    expected = one[CELLS[0]]
    for rank in results:
        assert rank["sharded"]["share"] == pytest.approx(0.5, abs=0.02)
        assert_same_update(rank["sharded"]["weights"], expected["weights"], expected["before"])
        assert rank["sharded"]["eval"]["eval_kd"] == pytest.approx(expected["eval"]["eval_kd"], rel=1e-5)
