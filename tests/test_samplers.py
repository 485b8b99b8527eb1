"""Random targets of K entries: how often each token is selected, against the slow path and against closed forms.

Shapes: V vocabulary, K entries.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.demo import TEACHER
from hf_distill.demo.text import stories
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.losses.sparse import SparseSignal
from hf_distill.samplers import BLOCK, likeliest, multinomial, tau_for, threshold


def dense(target, vocab):
    """The target as (n, V)."""
    return torch.zeros(len(target.ids), vocab, dtype=target.weights.dtype).scatter_add_(-1, target.ids, target.weights)


def taus_of(probs, num_entries):
    """The numbers (n, 1) at which `sum_v min(1, t_v / tau) = K`, by bisection; 0 where no more than K are positive."""
    high = torch.ones(len(probs), 1, dtype=torch.float64)
    low = 1e-300 * high
    for _ in range(70):
        middle = low.sqrt() * high.sqrt()
        is_more = (probs / middle).clamp(max=1).sum(-1, keepdim=True) > num_entries
        low, high = torch.where(is_more, middle, low), torch.where(is_more, high, middle)
    return high.masked_fill((probs > 0).sum(-1, keepdim=True) <= num_entries, 0)


def tau_of(probs, num_entries):
    return taus_of(torch.as_tensor(probs).unsqueeze(0), num_entries).item()


def slowly(probs, num_entries, uniform):
    """Threshold sampling of one distribution (V,) in float64, token by token: ids, exact ones apart, and tau."""
    tau = tau_of(probs, num_entries)
    exact = {token for token, p in enumerate(probs) if p > 0 and p >= tau * (1 - 1e-12)}
    end, goal, sampled = 0.0, uniform, set()
    for token, p in enumerate(probs):
        if token not in exact and p > 0:
            end += p / tau
            if end > goal:
                sampled.add(token)
                goal += 1
    return exact, sampled, tau


def distributions(vocab, number, seed=0):
    """Logits (number, V) of all kinds: nearly uniform to nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1.3, number).unsqueeze(-1)
    return (scale * torch.randn(number, vocab, generator=generator, dtype=torch.float64)).double()


EVENLY = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def drawn_evenly(logits, num_entries):
    """The targets (4000, V) of one distribution for numbers that lie evenly in [0, 1): an integral over them."""
    return threshold(logits.expand(len(EVENLY), -1), num_entries, EVENLY)


# ----------------------------------------------------------------------------------------------------------- threshold


@pytest.mark.parametrize("vocab", [3, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7, 40 * BLOCK])
@pytest.mark.parametrize("num_entries", [1, 2, 12, 50])
def test_the_tokens_are_those_of_the_slow_path(vocab, num_entries):
    logits = distributions(vocab, 12)
    uniforms = torch.linspace(0.01, 0.97, 12, dtype=torch.float64)
    target = threshold(logits, num_entries, uniforms)
    for row, probs in enumerate(logits.softmax(-1).numpy()):
        if (abs(probs - tau_of(probs, num_entries)) < 1e-4 * probs).any():
            continue  # so close to tau that it is taken for exact: the same mean, another sample
        exact, sampled, tau = slowly(probs, num_entries, uniforms[row].item())
        j = target.num_exact[row].item()
        ids, weights = target.ids[row].tolist(), target.weights[row].numpy()
        assert set(ids[:j]) == exact
        assert set(ids[j : len(exact) + len(sampled)]) == sampled
        np.testing.assert_allclose(weights[:j], probs[ids[:j]], rtol=1e-12)
        assert (np.diff(weights[:j]) <= 0).all()
        np.testing.assert_allclose(weights[j : j + len(sampled)], tau, rtol=1e-9)
        assert (weights[len(exact) + len(sampled) :] == 0).all()


@pytest.mark.parametrize("num_entries", [1, 2, 5, 9])
def test_each_token_is_selected_as_often_as_its_probability_says(num_entries):
    for logits in distributions(10, 6):
        probs = logits.softmax(-1)
        expected = np.minimum(1, probs.numpy() / tau_of(probs.numpy(), num_entries))
        found = (dense(drawn_evenly(logits, num_entries), 10) > 0).double().mean(0)
        np.testing.assert_allclose(found, expected, atol=1 / 4000)


@pytest.mark.parametrize("num_entries", [1, 2, 5, 9, 10])
def test_the_mean_target_is_the_distribution_and_its_squared_error_has_the_closed_form(num_entries):
    for logits in distributions(10, 6):
        probs = logits.softmax(-1)
        targets = dense(drawn_evenly(logits, num_entries), 10)
        tau = tau_of(probs.numpy(), num_entries)
        np.testing.assert_allclose(targets.mean(0), probs, atol=max(tau, 1e-12) / 4000)
        closed_form = (probs * (tau - probs).clamp(min=0)).sum().item()
        assert (targets - probs).square().sum(-1).mean().item() == pytest.approx(
            closed_form, abs=max(2e-3 * tau, 1e-15)
        )


def test_random_draws_are_unbiased_in_a_large_vocabulary():
    """A chi-square of the tokens that are drawn often enough: beyond 5 standard deviations once in two million runs."""
    torch.manual_seed(0)
    vocab, draws = 3000, 4000
    logits = 2 * torch.randn(vocab)
    probs = logits.double().softmax(-1)
    tau = tau_of(probs.numpy(), 25)
    mean = (
        dense(threshold(logits.expand(draws, -1), 25, torch.rand(draws, dtype=torch.float64)), vocab).double().mean(0)
    )
    deviation = (probs * (tau - probs).clamp(min=0) / draws).sqrt()
    often = deviation > 0.2 * tau / draws**0.5 / 10
    scores = ((mean - probs) / deviation)[often]
    assert len(scores) > 500
    assert (scores.square().mean() - 1).abs().item() < 5 * (2 / len(scores)) ** 0.5 * 1.5
    exact = probs >= tau
    torch.testing.assert_close(mean[exact], probs[exact], rtol=1e-5, atol=0)


def test_the_gradient_of_the_loss_has_the_mean_of_the_dense_one():
    """What the targets are for: forward KL from a sample, averaged over the uniform number."""
    logits, student = distributions(10, 6)[3], torch.randn(10, generator=torch.Generator().manual_seed(1)).double()
    target = drawn_evenly(logits, 4)
    hidden = student.expand(len(EVENLY), -1).clone().requires_grad_()
    signal = SparseSignal(*target)
    result = signal.loss(
        hidden, Head(torch.eye(10).double()), torch.zeros(len(hidden)).long(), Objective(kd_weight=1.0)
    )
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    p, q = logits.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(gradient.sum(0), q - p, rtol=0, atol=1e-4)
    assert (result.kd / len(EVENLY)).item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_entries", [1, 12, 50])
def test_there_are_exactly_as_many_entries_as_asked_for_and_their_weights_sum_to_one(num_entries, dtype):
    torch.manual_seed(0)
    logits = distributions(5000, 512).to(dtype)
    target = threshold(logits, num_entries, torch.rand(512))
    support = (logits.double().softmax(-1) > 1e-38).sum(-1)
    assert (support > num_entries).all()
    assert ((target.weights > 0).sum(-1) == num_entries).all()
    assert all(len(set(row)) == num_entries for row in target.ids.tolist())
    assert target.weights.dtype == target.entropy.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(target.weights.sum(-1), torch.ones_like(target.entropy), rtol=0, atol=2e-6)


def test_the_entropy_is_that_of_the_whole_distribution():
    logits = distributions(5000, 20)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    for target in (threshold(logits.float(), 12, torch.rand(20)), multinomial(logits.float(), 12, torch.rand(20, 12))):
        torch.testing.assert_close(target.entropy.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1 - 2**-53])
def test_rows_with_fewer_probable_tokens_than_entries_keep_all_of_them(dtype, uniform):
    """One-hot rows, tokens that are masked, probabilities that underflow; also more entries than the vocabulary has."""
    logits = torch.full((4, 600), -torch.inf, dtype=dtype)
    logits[0, 599] = 1.0
    logits[1, [3, 300, 500]] = torch.tensor([0.0, 2.0, 1.0], dtype=dtype)
    logits[2] = -20_000 * torch.arange(600)
    logits[3, :12] = torch.linspace(0, 3, 12).to(dtype)
    uniforms = torch.full((4,), uniform, dtype=torch.float64)
    expected = logits.softmax(-1)
    for num_entries in (12, 599, 600, 1000):
        target = threshold(logits, num_entries, uniforms)
        assert target.ids.shape == (4, min(num_entries, 600))
        assert target.num_exact.tolist() == [1, 3, 1, 12]
        torch.testing.assert_close(dense(target, 600), expected, rtol=1e-5, atol=0)
        assert (target.ids[target.weights == 0] == 0).all()
        torch.testing.assert_close(target.entropy, torch.special.entr(expected).sum(-1), rtol=1e-5, atol=1e-6)
        assert (target.ids[:3, 0] == torch.tensor([599, 300, 0])).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "weights",
    [
        [1.0] * 13,  # all of them
        [1.0] * 600,
        [8.0] + [1.0] * 40,
        [2.0, 1.0, 1.0],  # at 2 entries tau is the first one: exact or selected for sure
        [4.0, 2.0, 1.0, 1.0],
        [3.0, 3.0, 3.0, 1e-9],  # hardly anything besides K entries
        [1.0, 1.0, 1e-30, 1e-30],
    ],
)
def test_ties_are_no_trouble(weights, dtype):
    """Equal probabilities, and those that are equal to tau: the mean is right, and no token comes twice."""
    probs = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    uniforms = torch.cat([EVENLY, torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)])
    for num_entries in (2, 3, 12):
        target = threshold(probs.log().to(dtype).expand(len(uniforms), -1), num_entries, uniforms)
        found = dense(target, len(probs)).double()
        expected = min(num_entries, len(probs))
        assert ((target.weights > 0).sum(-1) == expected).all()
        assert ((found > 0).sum(-1) == expected).all()
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(found[:4000].mean(0), probs, atol=1e-3)


def test_with_a_tau_a_position_has_as_few_entries_as_keep_every_weight_below():
    logits, most = distributions(2000, 60), 100
    target = threshold(logits, most, torch.rand(60), tau=0.01)
    counts = (target.weights > 0).sum(-1).tolist()
    assert min(counts) < 5
    assert max(counts) == most  # where more would be needed
    for row, (count, probs) in enumerate(zip(counts, logits.softmax(-1).numpy(), strict=True)):
        assert target.weights[row].sum().item() == pytest.approx(1)
        assert (target.weights[row, count:] == 0).all()
        same = threshold(logits[row : row + 1], count, torch.zeros(1))
        assert same.num_exact == target.num_exact[row]
        torch.testing.assert_close(same.weights[0], target.weights[row, :count])
        if count < most:
            assert tau_of(probs, count) <= 0.01
            assert count == 1 or tau_of(probs, count - 1) > 0.01


@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.4, 1.0])
def test_with_a_tau_the_mean_target_is_the_distribution(tau):
    for logits in distributions(10, 6):
        target = threshold(logits.expand(len(EVENLY), -1), 8, EVENLY, tau=tau)
        np.testing.assert_allclose(dense(target, 10).mean(0), logits.softmax(-1), atol=1 / 4000)


@pytest.mark.parametrize("num_entries", [4, 8, 30.3])
def test_the_tau_for_a_mean_number_of_entries_leads_to_it(num_entries):
    logits = distributions(2000, 200)
    probs = likeliest(logits, 64)
    tau = tau_for(probs, num_entries)
    counts = (threshold(logits, 64, torch.rand(200), tau=tau).weights > 0).sum(-1)
    assert num_entries - 0.2 < counts.double().mean().item() <= num_entries
    assert tau_for(probs, 64) == 0


def test_the_likeliest_come_with_the_mass_of_the_others():
    logits = distributions(2000, 20)
    top = logits.softmax(-1).sort(-1, descending=True).values
    for num_entries in (1, 7, 300):
        found = likeliest(logits, num_entries)
        torch.testing.assert_close(found[:, :-1], top[:, :num_entries], rtol=1e-12, atol=0)
        torch.testing.assert_close(found[:, -1], top[:, num_entries:].sum(-1), rtol=1e-9, atol=0)
    sure = likeliest(torch.tensor([[60.0, 1.0, 0.0, -20.0]]), 1)  # in float32, where 1 minus the first is 0
    assert sure[0, 1].item() == pytest.approx(np.exp(-59) + np.exp(-60), rel=1e-5)


# --------------------------------------------------------------------------------------------------------- multinomial


def test_draws_are_counted_and_their_tokens_come_once():
    torch.manual_seed(0)
    logits = distributions(700, 40).float()
    target = multinomial(logits, 30, torch.rand(40, 30))
    assert target.ids.shape == target.weights.shape == (40, 30)
    counts = target.weights * 30
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-5)
    for ids, weights in zip(target.ids, target.weights, strict=True):
        assert weights.sum().item() == pytest.approx(1)
        assert len(set(ids[weights > 0].tolist())) == (weights > 0).sum()
        assert (weights[(weights > 0).sum() :] == 0).all()
    assert (target.num_exact == 0).all()


def test_draws_follow_the_distribution_and_are_independent():
    """The counts of 8,000 draws: their mean, and the squared error `(1 - sum t^2) / N` of N independent draws."""
    torch.manual_seed(0)
    logits = distributions(10, 6)[2]
    probs = logits.softmax(-1)
    targets = dense(multinomial(logits.expand(2000, -1), 4, torch.rand(2000, 4, dtype=torch.float64)), 10)
    deviation = (probs * (1 - probs) / 8000).sqrt()
    assert ((targets.mean(0) - probs).abs() < 5 * deviation).all()
    squared_error = (targets - probs).square().sum(-1).mean().item()
    assert squared_error == pytest.approx((1 - probs.square().sum()).item() / 4, rel=0.1)


def test_a_rare_token_late_in_the_vocabulary_is_drawn_as_often_as_an_early_one():
    """Cumulative sums in float32 would be equal there for six of seven neighbours, which nothing could select."""
    vocab = 3000
    probs = torch.full((vocab,), 1e-8, dtype=torch.float64)
    probs[0] = 1 - probs[1:].sum()
    places = (torch.arange(20 * (vocab - 1), dtype=torch.float64) + 0.5) / (20 * (vocab - 1))
    uniforms = probs[0] + (1 - probs[0]) * places
    target = multinomial(probs.log().float().unsqueeze(0), len(uniforms), uniforms.unsqueeze(0))
    counts = (dense(target, vocab)[0] * len(uniforms)).round()[20:]
    assert counts.min() >= 18
    assert counts.max() <= 22


# ---------------------------------------------------------------------------------------------------------------- both


@pytest.fixture(scope="module")
def demo_probs():
    """Distributions (n, V) of the packaged teacher on stories like its own."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    model = AutoModelForCausalLM.from_pretrained(Path(TEACHER)).eval()
    texts = [tokenizer(text).input_ids for text in stories(6, seed=123)]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts])
    return logits.double().softmax(-1)


def draws_for(probs, num_entries):
    """The number of draws that have so many different tokens in the mean, by bisection."""
    low, high, log_misses = 1.0, 1e9, torch.log1p(-probs.clamp(max=1 - 1e-15))
    for _ in range(50):
        middle = (low * high) ** 0.5
        mean = -torch.expm1(middle * log_misses).sum(-1).mean().item()
        low, high = (middle, high) if mean < num_entries else (low, middle)
    return high


def closed_form(probs, taus):
    """The squared error of threshold sampling, the mean over (n, V)."""
    return (probs * (taus - probs).clamp(min=0)).sum(-1).mean().item()


@pytest.mark.parametrize("num_entries", [12, 25, 50])
def test_threshold_sampling_has_the_smallest_squared_error_at_equal_entries_of_every_position(num_entries, demo_probs):
    """Each position with as many draws as have K different tokens in the mean; drawn, and in closed form."""
    for probs in demo_probs[::10]:
        taus = torch.tensor([tau_of(probs.numpy(), num_entries)])
        draws = draws_for(probs.unsqueeze(0), num_entries)
        assert closed_form(probs, taus) < 0.5 * (1 - probs.square().sum().item()) / draws

    torch.manual_seed(0)
    taus = taus_of(demo_probs, num_entries)
    targets = [threshold(demo_probs.log(), num_entries, torch.rand(len(demo_probs))) for _ in range(20)]
    assert all(((target.weights > 0).sum(-1) == num_entries).all() for target in targets)
    errors = [(dense(target, demo_probs.shape[-1]) - demo_probs).square().sum(-1).mean().item() for target in targets]
    assert np.mean(errors) == pytest.approx(closed_form(demo_probs, taus), rel=0.1)


@pytest.mark.parametrize(("num_entries", "most"), [(12, 0.80), (25, 0.70), (50, 0.62)])
def test_one_tau_for_a_text_has_the_smallest_squared_error_at_equal_entries_of_the_text(num_entries, most, demo_probs):
    """Draws with replacement also spend fewer entries where the teacher is sure; this teacher mostly is."""
    logits, vocab = demo_probs.log(), demo_probs.shape[-1]
    tau = tau_for(likeliest(logits, 255), num_entries)
    torch.manual_seed(0)
    targets = [threshold(logits, 255, torch.rand(len(logits)), tau=tau) for _ in range(10)]
    counts = (targets[0].weights > 0).sum(-1)
    assert counts.double().mean().item() == pytest.approx(num_entries, rel=0.01)
    assert counts.min() < num_entries / 3
    assert counts.max() > 3 * num_entries
    error = np.mean([(dense(target, vocab) - demo_probs).square().sum(-1).mean().item() for target in targets])
    multinomial_error = ((1 - demo_probs.square().sum(-1)) / draws_for(demo_probs, num_entries)).mean().item()
    equal_error = closed_form(demo_probs, taus_of(demo_probs, num_entries))
    assert error < most * multinomial_error
    assert error < most * equal_error


@pytest.mark.parametrize("sampler", [threshold, multinomial])
def test_no_rows_are_no_targets(sampler):
    target = sampler(torch.empty(0, 300), 4, torch.empty(0) if sampler is threshold else torch.empty(0, 4))
    assert target.ids.shape == target.weights.shape == (0, 4)
    assert target.entropy.shape == target.num_exact.shape == (0,)


@pytest.mark.parametrize("sampler", [threshold, multinomial])
def test_a_row_depends_on_its_own_numbers_only_and_nothing_is_changed(sampler):
    logits, uniforms = distributions(700, 9).float(), torch.rand(9, 4)
    uniforms = uniforms[:, 0] if sampler is threshold else uniforms
    before = logits.clone()
    whole = sampler(logits, 4, uniforms)
    assert torch.equal(logits, before)
    for rows in (slice(0, 1), slice(3, 8)):
        for part, all_of_it in zip(sampler(logits[rows], 4, uniforms[rows]), whole, strict=True):
            torch.testing.assert_close(part, all_of_it[rows])


@pytest.mark.parametrize(
    ("sampler", "num_entries", "shape", "message"),
    [
        (threshold, 0, (9,), "at least one entry, got 0"),
        (threshold, 4, (9, 4), r"uniforms have to be \(9,\), got \(9, 4\)"),
        (multinomial, 4, (9,), r"uniforms have to be \(9, 4\), got \(9,\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(sampler, num_entries, shape, message):
    with pytest.raises(ValueError, match=message):
        sampler(torch.randn(9, 20), num_entries, torch.rand(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", [threshold, multinomial])
def test_cuda_equals_the_cpu(sampler):
    logits, uniforms = distributions(5000, 64).float(), torch.rand(64, 12, dtype=torch.float64)
    uniforms = uniforms[:, 0] if sampler is threshold else uniforms
    one, other = sampler(logits, 12, uniforms), sampler(logits.cuda(), 12, uniforms.cuda())
    same = (dense(one, 5000) - dense(type(other)(*(x.cpu() for x in other)), 5000)).abs().amax(-1) < 1e-5
    assert same.float().mean() > 0.95  # a sum that is rounded otherwise may select a neighbour
