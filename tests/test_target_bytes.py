"""Targets as bytes: the bits against numpy's own, round trips, sizes, and that a packed sample is still unbiased."""

import numpy as np
import pytest
import torch

from hf_distill.samplers import multinomial, threshold
from hf_distill.target_bytes import PackedTargets, id_bits, pack_bits, pack_targets, unpack_bits, unpack_targets


def random_targets(vocab, sampler=threshold, rows=300, num_entries=12, tau=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1.7, rows).unsqueeze(-1)
    logits = scale * torch.randn(rows, vocab, generator=generator)
    if sampler is threshold:
        return threshold(logits, num_entries, torch.rand(rows, generator=generator), tau=tau)
    return multinomial(logits, num_entries, torch.rand(rows, num_entries, generator=generator))


def packed(target, vocab, num_values=None):
    num_values = target.num_exact if num_values is None else num_values
    return pack_targets(target.ids.numpy(), target.weights.numpy(), num_values.numpy(), vocab)


@pytest.mark.parametrize("width", [4, 5, 8, 9, 16, 17, 18, 24, 25])
def test_bits_are_those_of_numpy_one_number_after_the_other(width):
    rng = np.random.default_rng(width)
    for count in (0, 1, 2, 7, 8, 9, 1001):
        numbers = rng.integers(0, 2**width, count)
        numbers[:1] = 2**width - 1
        found = pack_bits(numbers, width)
        bits = (numbers[:, None] >> np.arange(width)) & 1
        assert found.tobytes() == np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()
        np.testing.assert_array_equal(unpack_bits(found, width, count), numbers)
        # What follows in a file plays no part, and a part of a map that cannot be written to is enough.
        longer = np.concatenate([found, np.full(9, 255, np.uint8)])
        longer.flags.writeable = False
        np.testing.assert_array_equal(unpack_bits(longer, width, count), numbers)


@pytest.mark.parametrize(
    ("vocab_size", "bits"),
    [(2, 4), (16, 4), (17, 5), (512, 9), (49_152, 16), (65_536, 16), (65_537, 17), (2**17, 17), (151_936, 18)],
)
def test_an_id_has_the_bits_of_the_largest_one(vocab_size, bits):
    assert id_bits(vocab_size) == bits


@pytest.mark.parametrize("vocab", [16, 700, 5000])
@pytest.mark.parametrize("tau", [0.0, 0.02], ids=["fixed", "ragged"])
def test_targets_come_back_as_they_were_to_within_float16(vocab, tau):
    target = random_targets(vocab, tau=tau)
    data = packed(target, vocab)
    ids, weights = unpack_targets(data, vocab)
    width = int(data.num_entries.max())
    assert ids.shape == weights.shape == (300, width)
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(ids, target.ids[:, :width])
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(data.num_values, target.num_exact)
    expected = target.weights[:, :width].numpy()
    assert ((weights > 0) == (expected > 0))[expected > 2**-24].all()  # smaller ones are 0 in float16
    np.testing.assert_allclose(weights[:, 1:], expected[:, 1:], rtol=2**-11, atol=2**-25)
    # The first one bears the errors of all others: none of a sure teacher, whose others are small.
    np.testing.assert_allclose(weights[:, 0], expected[:, 0], atol=2**-11)
    sure = expected[:, 0] > 0.999
    assert sure.sum() > 5
    np.testing.assert_allclose(1 - weights[sure, 0], expected[sure, 1:].sum(-1), rtol=1e-3, atol=3e-7)


def test_draws_with_replacement_have_a_value_each():
    target = random_targets(700, multinomial, num_entries=30)
    ids, weights = unpack_targets(packed(target, 700, (target.weights > 0).sum(-1)), 700)
    np.testing.assert_array_equal(ids, target.ids[:, : ids.shape[1]])
    np.testing.assert_allclose(weights, target.weights[:, : ids.shape[1]], atol=2**-11)


def test_rows_with_few_or_one_or_no_value_of_their_own():
    ids = np.array([[3, 4, 5], [7, 0, 0], [1, 2, 0], [9, 8, 0], [5, 6, 7]])
    weights = np.array([[1, 1, 1], [1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]]) / [
        [3],
        [1],
        [1],
        [1],
        [1],
    ]
    num_values = np.array([0, 1, 2, 0, 1])
    found = unpack_targets(pack_targets(ids, weights, num_values, 10), 10)
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_allclose(found[1], weights, rtol=1e-6)


def test_no_positions_are_no_bytes():
    data = pack_targets(np.zeros((0, 12)), np.zeros((0, 12)), np.zeros(0), 700)
    assert data.nbytes == 0
    assert [x.shape for x in unpack_targets(data, 700)] == [(0, 1), (0, 1)]


def test_a_packed_sample_has_the_mean_of_the_distribution():
    """Over numbers that lie evenly in [0, 1): what float16 leaves is the rounding of fixed numbers, 2^-11 of each."""
    torch.manual_seed(0)
    for scale in (1.0, 3.0, 12.0):
        logits = scale * torch.randn(10, dtype=torch.float64)
        target = threshold(logits.expand(4000, -1), 4, (torch.arange(4000).double() + 0.5) / 4000)
        ids, weights = unpack_targets(packed(target, 10), 10)
        mean = np.zeros(10)
        np.add.at(mean, ids, weights / 4000)
        np.testing.assert_allclose(mean, logits.softmax(-1), atol=1e-3)


def test_the_bytes_are_those_of_the_table():
    """For 12 entries of which j are exact: bits of the ids, 14 bits for each of the j, and two counts."""
    for vocab, bits in ((5000, 13), (700, 10)):
        target = random_targets(vocab)
        expected = 300 * (12 * bits / 8 + 2) + 14 / 8 * target.num_exact.sum().item()
        assert packed(target, vocab).nbytes == pytest.approx(expected, abs=2)


def test_every_probability_in_float16_comes_back():
    every = np.arange(0x3C01, dtype=np.uint16).view(np.float16).astype(np.float32)[1:]  # 0 is no entry
    ids, weights = np.tile([3, 4, 5], (len(every), 1)), np.stack([np.full_like(every, 2), every, every], -1) / 2
    found = unpack_targets(pack_targets(ids, weights, np.full(len(every), 2), 10), 10)[1]
    np.testing.assert_array_equal(found[:, 1:], (weights.astype(np.float16)[:, [1, 1]]))


def test_a_part_of_what_was_packed_is_read_alone():
    """As a document of a shard is: slices of maps that nobody may write to."""
    parts = [packed(random_targets(700, seed=seed, tau=0.02), 700) for seed in range(3)]
    whole = PackedTargets(*(np.concatenate(streams) for streams in zip(*parts, strict=True)))
    starts = [np.cumsum([0, *(len(part[i]) for part in parts)]) for i in range(4)]
    for number, part in enumerate(parts):
        view = PackedTargets(
            *(stream[start[number] : start[number + 1]] for stream, start in zip(whole, starts, strict=True))
        )
        for stream in view:
            stream.flags.writeable = False
        for mine, theirs in zip(unpack_targets(view, 700), unpack_targets(part, 700), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (np.full((1, 2), 700), np.full((1, 2), 0.5), "ids range from 700 to 700; 0 to 699 are possible"),
        (np.full((1, 2), -1), np.full((1, 2), 0.5), "ids range from -1 to -1"),
        (np.zeros((1, 256)), np.full((1, 256), 1 / 256), "at most 255 entries, got 256"),
        (np.zeros((1, 2)), np.array([[0.5, 1.5]]), r"probabilities in \[0, 1\], got up to 1.5"),
        (np.zeros((1, 2)), np.array([[0.5, np.nan]]), r"probabilities in \[0, 1\], got up to nan"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_words(ids, weights, message):
    with pytest.raises(ValueError, match=message):
        pack_targets(ids, weights, np.full(1, 2), 700)
