"""Formulas of traffic; tests/distributed/test_engines.py compares them with what is really sent."""

import pytest

from hf_distill.traffic import ENGINES, bytes_between_processes, bytes_for_rollouts, bytes_from_teacher


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_sends_nothing(engine):
    found = bytes_between_processes(engine, 1, parameters=1000, trainable=1000, micro_batches=3)
    assert set(found.values()) == {0}


def test_engines_by_hand_for_four_processes_and_three_micro_batches():
    # A ring of four sends three quarters; 1,000 parameters of 2 bytes, 100 gradients of 4 bytes.
    sizes = {"parameters": 1000, "trainable": 100, "micro_batches": 3, "gradient_bytes": 4}
    expected = {
        "ddp": {"gradients": 600, "weights": 0},  # one all-reduce
        "zero2": {"gradients": 1800, "weights": 150},  # three, and the updated parameters
        "fsdp2": {"gradients": 300, "weights": 9000},  # one reduce-scatter; six gathers
        "zero3": {"gradients": 900, "weights": 9000},
    }
    assert {engine: bytes_between_processes(engine, 4, **sizes) for engine in ENGINES} == expected
    assert bytes_between_processes("fsdp2", 4, **sizes, once=200)["weights"] == 9000 - 3 * 300


def test_numbers_of_the_documentation():
    parameters = 8_030_000_000
    found = bytes_between_processes("fsdp2", 8, parameters=parameters, trainable=parameters)
    assert {name: round(value / 1e9) for name, value in found.items()} == {"gradients": 14, "weights": 28}
    small = {"parameters": 494_000_000, "trainable": 494_000_000, "gradient_bytes": 4}
    assert round(bytes_between_processes("ddp", 8, **small)["gradients"] / 1e9, 1) == 3.5
    assert round(bytes_from_teacher(4096, 3584) / 1e6) == 29
    assert bytes_from_teacher(10, 8, inner_layers=2) == 10 * 8 * 3 * 2
    assert round(bytes_for_rollouts(8, parameters) / 1e9) == 14


def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match=r"one of ddp, fsdp2, zero2, zero3, got 'fsdp'"):
        bytes_between_processes("fsdp", 2, parameters=1, trainable=1)
