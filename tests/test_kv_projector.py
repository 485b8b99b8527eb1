"""Projectors against the formulas of their layers, planted maps and their own files."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from hf_distill.kv_projector import KVProjector, PCAProjector, load_projector, save_projector


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(width, seed=0):
    return torch.linalg.qr(features(width, width, seed=seed, dtype=torch.float64))[0]


def mlp(seed=0, **changes):
    torch.manual_seed(seed)
    projector = KVProjector(**{"teacher_width": 6, "student_width": 4, **changes})
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # also the norm's weight and bias
    return projector


def by_hand(projector, side, index, x):
    """LayerNorm -> Linear -> SiLU -> Linear in float64, from the weights alone."""
    weights = {
        name.removeprefix(f"{side}.{index}."): value.double()
        for name, value in projector.state_dict().items()
        if name.startswith(f"{side}.{index}.")
    }
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    x = x * weights["0.weight"] + weights["0.bias"]
    x = x @ weights["1.weight"].T + weights["1.bias"]
    return x * torch.sigmoid(x) @ weights["4.weight"].T + weights["4.bias"]


# -------------------------------------------------------------------------------------------------- the trained one


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_projector_is_its_formula_for_keys_and_values_of_every_layer(shape):
    projector = mlp(num_layers=3).eval()
    keys, values = features(*shape, 6), features(*shape, 6, seed=1)
    seen = []
    for layer in range(3):
        found = projector(keys, values, layer)
        for side, x, y in zip(("keys", "values"), (keys, values), found, strict=True):
            assert y.shape == (*shape, 4)
            torch.testing.assert_close(y.double(), by_hand(projector, side, layer, x), rtol=1e-5, atol=1e-5)
        seen.append(found[0])
    assert shape == (0,) or not torch.allclose(seen[0], seen[1])


def test_one_projector_is_shared_by_all_layers():
    projector = mlp(num_layers=1).eval()
    keys, values = features(5, 6), features(5, 6, seed=1)
    first = projector(keys, values)
    for layer in (0, 1, 7):
        assert all(torch.equal(a, b) for a, b in zip(first, projector(keys, values, layer), strict=True))


def test_only_the_layers_own_projector_is_trained():
    projector = mlp(num_layers=2)
    sum(x.sum() for x in projector(features(5, 6), features(5, 6, seed=1), 1)).backward()
    got = {name for name, parameter in projector.named_parameters() if parameter.grad is not None}
    assert got == {name for name, _ in projector.named_parameters() if name.split(".")[1] == "1"}


def test_a_layer_that_does_not_exist_is_an_error():
    with pytest.raises(IndexError):
        mlp(num_layers=2)(features(5, 6), features(5, 6), 2)


@pytest.mark.parametrize(("ratio", "width"), [(1.0, 4), (2.5, 10), (0.5, 2), (0.01, 1)])
def test_mlp_ratio_is_in_units_of_the_students_width(ratio, width):
    projector = mlp(mlp_ratio=ratio)
    assert projector.keys[0][1].weight.shape == (width, 6)
    assert projector.values[0][4].weight.shape == (4, width)


def test_dropout_is_on_in_training_only():
    keys, values = features(50, 6), features(50, 6, seed=1)
    projector = mlp(dropout=0.5, mlp_ratio=8.0)
    assert not torch.equal(projector(keys, values)[0], projector(keys, values)[0])
    projector.eval()
    assert torch.equal(projector(keys, values)[0], projector(keys, values)[0])
    projector = mlp(dropout=0.0)
    assert torch.equal(projector(keys, values)[0], projector(keys, values)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_width": 0}, "teacher_width has to be at least 1, got 0"),
        ({"student_width": -1}, "student_width has to be at least 1, got -1"),
        ({"num_layers": 0}, "num_layers has to be at least 1, got 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio has to be above 0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio has to be above 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout in \[0, 1\)"),
    ],
)
def test_numbers_that_make_no_projector_are_refused_in_words(changes, message):
    with pytest.raises(ValueError, match=message):
        KVProjector(**{"teacher_width": 6, "student_width": 4, **changes})


# -------------------------------------------------------------------------------------------------- the frozen one


def spread(count, width, seed=0):
    """Features (count, width) with clearly different principal components, in no particular directions."""
    scales = 2.0 ** -torch.arange(width, dtype=torch.float64)
    return features(count, width, seed=seed, dtype=torch.float64) * 5 * scales @ rotation(width, seed=seed + 1) + 3


def top_directions(x, count):
    """The features along them, by the eigenvectors of the second moments."""
    return x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -count:]


def test_pca_recovers_a_planted_rotation_of_the_top_directions():
    projector = PCAProjector(7, 3, num_layers=2)
    planted = {}
    for kind in range(2):
        for layer in range(2):
            teacher = spread(60, 7, seed=10 * kind + layer)
            student = top_directions(teacher, 3) @ rotation(3, seed=30 + kind + 2 * layer)
            projector.fit(kind, layer, teacher, 0.4 * student)  # whatever the student's scale
            planted[kind, layer] = teacher, student
    for layer in range(2):
        teachers = [planted[kind, layer][0].float() for kind in range(2)]
        for kind, found in enumerate(projector(*teachers, layer)):
            torch.testing.assert_close(found.double(), planted[kind, layer][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [50, 4])
def test_pca_of_a_teacher_that_is_not_wider_keeps_all_of_it(count):
    """Also with no more tokens than the width: lengths and angles between tokens are the teacher's own."""
    teacher, student = spread(count, 4), features(count, 6, seed=5, dtype=torch.float64)
    projector = PCAProjector(4, 6).double()
    projector.fit(0, 0, teacher, student)
    found = projector(teacher, teacher)[0]
    torch.testing.assert_close(found @ found.T, teacher @ teacher.T)


def test_pca_is_the_best_orthogonal_map_of_the_top_directions():
    """Against random orthogonal maps."""
    teacher, student = spread(80, 5), features(80, 3, seed=5, dtype=torch.float64)
    student[:, 0] += teacher[:, 1]
    projector = PCAProjector(5, 3).double()
    projector.fit(0, 0, teacher, student)
    reduced = top_directions(teacher, 3)
    found = projector(teacher, teacher)[0]
    torch.testing.assert_close(found.norm(), reduced.norm())
    error = (found - student).norm()
    for seed in range(200):
        assert (reduced @ rotation(3, seed=seed) - student).norm() >= error - 1e-9


def test_pca_has_nothing_to_train_and_fits_only_what_it_is_told_to():
    projector = PCAProjector(5, 3, num_layers=2)
    assert list(projector.parameters()) == []
    projector.fit(1, 0, spread(30, 5).requires_grad_(), features(30, 3))
    assert not any(value.requires_grad for value in projector.state_dict().values())
    assert projector.matrix[1, 0].abs().sum() > 0
    assert all((projector.matrix[at] == 0).all() for at in ((0, 0), (0, 1), (1, 1)))
    keys, values = projector(features(2, 4, 5), features(2, 4, 5), 0)
    assert keys.shape == values.shape == (2, 4, 3)
    assert projector(features(4, 5).bfloat16(), features(4, 5).bfloat16())[1].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["mlp", "shared", "pca"])
def test_saved_projector_is_bit_identical(tmp_path, kind):
    if kind == "pca":
        projector = PCAProjector(6, 4, num_layers=3)
        for side in range(2):
            for layer in range(3):
                projector.fit(side, layer, spread(20, 6, seed=layer), features(20, 4, seed=side))
    else:
        projector = mlp(num_layers=1 if kind == "shared" else 3, mlp_ratio=1.5, dropout=0.3)
    before = copy.deepcopy(projector.state_dict())
    save_projector(projector, tmp_path / "some" / "folder")
    files = {path.name for path in (tmp_path / "some" / "folder").iterdir()}
    assert files == {"projector.safetensors", "projector.json"}
    loaded = load_projector(str(tmp_path / "some" / "folder"))
    assert type(loaded) is type(projector)
    assert loaded.settings == projector.settings
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert str(loaded) == str(projector)  # the dropout too
    x = features(5, 6)
    expected = projector.eval()(x, x, 0)
    assert all(torch.equal(a, b) for a, b in zip(loaded.eval()(x, x, 0), expected, strict=True))
    # Saving again over it is fine.
    save_projector(loaded, tmp_path / "some" / "folder")
    assert json.loads((tmp_path / "some" / "folder" / "projector.json").read_text()) == {
        "projector": "pca" if kind == "pca" else "mlp", **projector.settings
    }  # fmt: skip


@pytest.mark.parametrize("missing", ["projector.safetensors", "projector.json", "both"])
def test_folder_without_a_projector_is_refused_in_words(tmp_path, missing):
    save_projector(mlp(), tmp_path)
    for path in list(tmp_path.iterdir()):
        if missing in (path.name, "both"):
            path.unlink()
    with pytest.raises(ValueError, match=r"has no projector\.safetensors and projector\.json"):
        load_projector(tmp_path)


def test_projecting_keeps_the_gradient_of_what_is_projected():
    x = features(5, 6).requires_grad_()
    projector = mlp(dropout=0.0)
    F.mse_loss(projector(x, x)[0], torch.zeros(5, 4)).backward()
    assert x.grad.abs().sum() > 0
