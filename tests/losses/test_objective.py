import pytest
import torch

from hf_distill.losses.objective import Objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_weight": 1.5}, r"kd_weight has to lie in \[0, 1\], got 1.5"),
        ({"kd_weight": float("nan")}, "kd_weight has to lie"),
        ({"ce_weight": -0.1}, "ce_weight has to be at least 0 and finite, got -0.1"),
        ({"ce_weight": float("inf")}, "ce_weight has to be"),
        ({"temperature": 0.0}, "temperature has to be above 0"),
        ({"divergence": "kl"}, "choose one of"),
        ({"divergence_params": {"beta": 1}}, "no parameters"),
        ({"divergence": "jensen_shannon", "divergence_params": {"beta": 1.0}}, r"beta in \(0, 1\)"),
        ({"chunk_size": 0}, "chunk_size has to be at least 1, got 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def test_hard_labels_have_the_rest_of_the_weight_unless_told_otherwise():
    assert Objective(kd_weight=0.25).hard_weight == 0.75
    assert Objective(kd_weight=0.25, ce_weight=0.5).hard_weight == 0.5
    assert Objective(kd_weight=0.25, ce_weight=0.0).hard_weight == 0


def test_the_factor_of_the_divergence_has_a_power_of_the_temperature():
    assert Objective(kd_weight=0.5, temperature=3.0).kd_factor == 4.5
    assert Objective(kd_weight=0.5, temperature=3.0, divergence="total_variation").kd_factor == 1.5


@pytest.mark.parametrize(
    ("num_items", "expected"),
    [(None, 5), (7, 7), (0.5, 1), (0, 1), (torch.tensor(7), 7), (torch.tensor(0), 1)],
)
def test_the_divisor_is_the_number_of_rows_by_default_and_never_below_one(num_items, expected):
    assert Objective(num_items=num_items).divisor(5) == expected
    assert Objective().divisor(0) == 1


def test_the_divisor_comes_to_the_device_of_the_loss():
    device = torch.device("meta")
    assert Objective(num_items=torch.tensor(7)).divisor(5, device).device == device
    assert Objective(num_items=torch.tensor(7)).divisor(5).device.type == "cpu"
