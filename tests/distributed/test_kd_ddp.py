"""Two processes (DDP, gloo) do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.kd_runs import run

RUNS = ["full", "lora", "tied", "speculative", "kv", "stored", "streamed", "remote"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of both processes."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("kd_runs.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), str(folder)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), num_processes=1)


@pytest.mark.parametrize("student", RUNS)
def test_there_really_are_two_processes(one, two, student):
    assert (one[student]["num_processes"], one[student]["distributed_type"]) == (1, "DistributedType.NO")
    for results in two:
        assert results[student]["num_processes"] == 2
        assert results[student]["distributed_type"] == "DistributedType.MULTI_CPU"
        assert results[student]["wrapper"] == "DistributedDataParallel"


@pytest.mark.parametrize("student", RUNS)
@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_two_processes_have_the_gradients_and_the_weights_of_one(one, two, student, what):
    expected = one[student][what]
    for results in two:
        found = results[student][what]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-8, name


@pytest.mark.parametrize("student", RUNS)
def test_two_processes_log_what_one_logs(one, two, student):
    names = {"loss", "kd", "ce", "agreement", "student_entropy", "num_tokens", "grad_norm"}
    for found, expected in zip(two[0][student]["logs"], one[student]["logs"], strict=True):
        assert found.keys() == expected.keys()
        for name in found.keys() & names:
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("student", RUNS)
def test_evaluation_counts_each_row_once_though_rows_do_not_divide_among_processes(one, two, student):
    for results in two:
        names = {"eval_loss", "eval_kd", "eval_ce", "eval_agreement", "eval_student_entropy"}
        for name in names & one[student]["eval"].keys():
            for evaluation in [key for key in ("eval", "packed_eval") if key in results[student]]:
                found = results[student][evaluation][name]
                assert found == pytest.approx(one[student]["eval"][name], rel=1e-5), (evaluation, name)


def test_a_store_does_what_its_teacher_does(one, two):
    for results in (one, *two):
        for name in ("stored", "streamed"):
            for key, value in results["full"]["weights"].items():
                assert (results[name]["weights"][key] - value).norm() <= 1e-4 * value.norm(), (name, key)


def test_non_finite_loss_in_one_process_stops_both(two):
    for results in two:
        assert "non-finite training at step 1" in results["nan"]


def test_rollout_rates_count_what_all_processes_have_written(one, two):
    for name in ("acceptance_rate", "full_block_rate", "draft_length_mean", "tokens_drafted", "tokens_accepted"):
        found, expected = (run["speculative"]["logs"][-1][f"rollout/{name}"] for run in (two[0], one))
        assert found == pytest.approx(expected, rel=1e-5), name


def test_the_projector_is_trained_with_the_student_and_its_cosine_counts_all_processes(one, two):
    assert any("projectors" in name for name in one["kv"]["gradients"])
    for found, expected in zip(two[0]["kv"]["logs"], one["kv"]["logs"], strict=True):
        for name in ("kv/cosine", "kv/cosine_layer_0", "kv/cosine_layer_1"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
