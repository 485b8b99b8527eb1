"""What the three methods keep of a teacher, against its distributions in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_distill.hidden_bytes import choose_rounding, folded_head
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.head import Head
from hf_distill.samplers import likeliest, tau_for
from hf_distill.store.formats import MOST_ENTRIES, format_of, sparse_fidelity, uniforms
from hf_distill.store.head import read_head, read_rounding, write_head, write_rounding
from hf_distill.store.manifest import Manifest
from hf_distill.store.shards import Shard, write_shard

WIDTH, VOCAB, ROWS = 32, 300, 310  # the head has padding
COUNTS = [5, 1, 18, 0, 7]
KEYS = [bytes([i]) * 16 for i in range(len(COUNTS))]


def random_signal(num_positions=31, seed=0, dtype=torch.float32, **head):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    hidden = torch.randn(num_positions, WIDTH, generator=generator)
    hidden[:, 1] *= 20  # a massive activation
    hidden *= torch.logspace(-1.5, 0.3, num_positions).unsqueeze(1)  # from unsure to sure
    return TeacherSignal(hidden.to(dtype), Head((0.2 * weight).to(dtype), **head))


def exact_signal(signal):
    """A similar one whose products are exact, in whatever order a library sums them up."""
    head = signal.head._replace(weight=(signal.head.weight * 32).round() / 32)
    return TeacherSignal((signal.hidden * 8).round().clamp(-64, 64) / 8, head)


def true_probs(signal, temperature=1.0):
    """(N, V), by the formula in float64."""
    head = signal.head
    logits = signal.hidden.double() @ head.weight[:VOCAB].double().T
    if head.bias is not None:
        logits = logits + head.bias[:VOCAB].double()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    return (logits / temperature).softmax(-1)


def manifest_of(method, parameters, **more):
    return Manifest(method, parameters, {}, {}, VOCAB, **{"temperature": 1.0, "seed": 0, **more})


def sampled(signal, sampler="threshold", entries=12, temperature=1.0, seed=0):
    chosen = {}
    if sampler == "threshold":
        logits = true_probs(signal, temperature).log()
        chosen = {"tau": tau_for(likeliest(logits, MOST_ENTRIES), entries)}
    parameters = {"sampler": sampler, "entries": entries}
    return format_of(manifest_of("sampled", parameters, chosen=chosen, temperature=temperature, seed=seed))


def top_k(entries):
    return format_of(manifest_of("topk", {"entries": entries}))


def hidden_format(signal, dtype):
    """The format, and the head of its store."""
    rounding, _ = choose_rounding(signal.hidden, signal.head, dtype, vocab_size=VOCAB, seed=0)
    head = {"width": WIDTH, "dtype": str(signal.head.weight.dtype).removeprefix("torch.")}
    return format_of(manifest_of("hidden", {"dtype": dtype}, head=head), rounding), folded_head(signal.head, rounding)


def through_files(folder, format, documents):
    """Documents as they come out of a shard."""
    write_shard(folder, "0001-00000", np.zeros((len(documents), 16), np.uint8), documents, format.streams)
    shard = Shard(folder, "0001-00000", format.streams)
    return [shard.read(i) for i in range(len(documents))]


def restored(folder, format, signal, head=None):
    """The signal that a store has of another one, through bytes in files."""
    documents = format.encode(signal, KEYS, COUNTS)
    return format.signal(format.collate(through_files(folder, format, documents)), head)


def dense(ids, weights):
    """(N, V), of entries (N, K)."""
    return torch.zeros(len(ids), VOCAB, dtype=torch.float64).scatter_add_(1, ids.long(), weights.double())


HEADS = {"plain": {}, "bias, scale, cap": {"bias": torch.linspace(-1, 1, ROWS), "logit_scale": 0.5, "softcap": 8.0}}


# ------------------------------------------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("dtype", "kl"), [("float16", 1e-6), ("int8", 2e-2)])
def test_hidden_states_give_the_teachers_distributions(tmp_path, head, dtype, kl):
    signal = random_signal(**head)
    format, folded = hidden_format(signal, dtype)
    found = restored(tmp_path, format, signal, folded)
    assert found.hidden.dtype == torch.float32
    teacher, stored = true_probs(signal), true_probs(found)
    assert 0 <= (teacher * (teacher / stored).log()).sum(-1).max() < kl


def test_hidden_states_in_bfloat16_come_back_as_they_were(tmp_path):
    signal = random_signal(dtype=torch.bfloat16)
    format, head = hidden_format(signal, "float16")
    found = restored(tmp_path, format, signal, head)
    assert found.hidden.dtype == torch.bfloat16
    assert torch.equal(found.hidden, signal.hidden)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_is_read_as_it_was_written(tmp_path, head):
    head = random_signal(**head).head
    about = write_head(tmp_path, head)
    assert (about["rows"], about["width"], about["dtype"]) == (ROWS, WIDTH, "float32")
    found = read_head(tmp_path, about)
    assert (found.logit_scale, found.softcap) == (head.logit_scale, head.softcap)
    assert torch.equal(found.weight, head.weight)
    assert (found.bias is None) == (head.bias is None)
    assert found.bias is None or torch.equal(found.bias, head.bias)


def test_a_damaged_or_missing_head_is_named(tmp_path):
    about = write_head(tmp_path, random_signal().head)
    path = tmp_path / "head.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{path} is missing or damaged: run `hf-distill cache write`"):
            read_head(tmp_path, about)
    path.unlink()
    with pytest.raises(ValueError, match="is missing or damaged"):
        read_head(tmp_path, about)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_rounding_is_read_as_it_was_written_or_not_at_all(tmp_path, dtype):
    signal = random_signal()
    rounding, _ = choose_rounding(signal.hidden, signal.head, dtype, vocab_size=VOCAB, seed=0)
    chosen = write_rounding(tmp_path, rounding)
    found = read_rounding(tmp_path, dtype, chosen)
    assert found[:2] == rounding[:2]
    for own, expected in zip(found[2:], rounding[2:], strict=True):
        assert own is expected is None or torch.equal(own, expected)
    path = tmp_path / "rounding.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{path} is missing or damaged, and nothing can be added"):
            read_rounding(tmp_path, dtype, chosen)
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("sampler", "temperature"), [("threshold", 1.0), ("threshold", 2.0), ("multinomial", 1.0)])
def test_the_mean_of_samples_is_the_teachers_distribution(head, sampler, temperature):
    count, draws = 4, 200
    signal = random_signal(count, **head)
    probs = true_probs(signal, temperature)
    format = sampled(signal, sampler, 12, temperature)
    many = signal._replace(hidden=signal.hidden.repeat(draws, 1))
    keys = [i.to_bytes(16, "little") for i in range(draws)]
    found = format.signal(format.collate(format.encode(many, keys, [count] * draws)), None)
    assert found.temperature == temperature
    assert found.vocab_size == VOCAB
    samples = dense(found.ids, found.weights).unflatten(0, (draws, count))
    assert torch.allclose(samples.sum(-1), torch.ones(draws, count, dtype=torch.float64), atol=1e-6)
    # A token that is sampled has the weight tau, with a variance of no more than p * tau: Bernstein's inequality, at a
    # level of 1e-7 for each of 1,200 means. float16 rounds the weights, and what the first one lacks to 1.
    is_sampled = (found.num_exact.unsqueeze(-1) <= torch.arange(found.weights.shape[1])) & (found.weights > 0)
    tau = (found.weights * is_sampled).amax(-1).unflatten(0, (draws, count)).amax(0).double().unsqueeze(-1)
    tau = torch.full_like(tau, 1 / 12) if sampler == "multinomial" else tau
    rounding = 2**-11 * (probs + (probs == probs.amax(-1, keepdim=True)))
    error = (samples.mean(0) - probs).abs()
    assert (error <= 5.7 * (probs * tau / draws).sqrt() + 11 * tau / draws + rounding + 1e-6).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sample_says_which_probabilities_it_knows_and_how_unsure_the_teacher_is(tmp_path, temperature):
    signal = random_signal()
    probs = true_probs(signal, temperature)
    found = restored(tmp_path, sampled(signal, temperature=temperature), signal)
    entropy = -(probs * probs.clamp(min=1e-300).log()).sum(-1)
    assert torch.allclose(found.entropy.double(), entropy, rtol=2**-10, atol=1e-6)
    for ids, weights, known, expected in zip(found.ids, found.weights, found.num_exact, probs, strict=True):
        known = int(known)
        count = int((weights > 0).sum())
        assert len(set(ids[:count].tolist())) == count
        assert (weights[count:] == 0).all()
        assert ids.max() < VOCAB
        # All but the first are stored in float16; the first is what they lack to 1.
        assert torch.allclose(weights[1:known].double(), expected[ids[1:known].long()], rtol=2**-10)
        if known:
            assert weights[0].double() == pytest.approx(expected[ids[0].long()].item(), abs=count * 2**-11)
        assert known == 0 or ids[0] == expected.argmax()
    mean = (found.weights > 0).sum(-1).double().mean().item()
    assert 8 < mean <= 12


def test_multinomial_weights_are_shares_of_the_draws(tmp_path):
    signal = random_signal()
    for entries in (1, 7, 50):
        found = restored(tmp_path, sampled(signal, "multinomial", entries), signal)
        counts = found.weights.double() * entries
        assert (counts - counts.round()).abs().max() < entries * 2**-10
        assert torch.allclose(found.weights.sum(-1), torch.ones(len(counts)))
        assert (found.num_exact == 0).all()


def test_uniforms_depend_on_seed_key_and_position_alone():
    key, other = b"\1" * 16, b"\1" * 15 + b"\2"
    whole = uniforms(3, key, 100, 5)
    assert whole.shape == (100, 5)
    assert whole.dtype == np.float64
    assert 0 <= whole.min() < 0.01
    assert 0.99 < whole.max() < 1
    for count in (0, 1, 37):
        assert np.array_equal(uniforms(3, key, count, 5), whole[:count])
    everything = np.concatenate([whole.ravel(), uniforms(4, key, 100, 5).ravel(), uniforms(3, other, 100, 5).ravel()])
    assert len(np.unique(everything)) == everything.size
    # Uniform: the largest distance between the empirical distribution and the line, at the level 1e-6.
    many = np.sort(np.concatenate([uniforms(0, bytes([i]) * 16, 100, 1).ravel() for i in range(200)]))
    assert np.abs(many - (np.arange(many.size) + 0.5) / many.size).max() < math.sqrt(math.log(2e6) / (2 * many.size))
    assert uniforms(2**63 - 1, key, 2, 1).shape == (2, 1)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype
        assert np.array_equal(found[name], expected[name]), name


FORMATS = {
    "float16": lambda signal: hidden_format(signal, "float16")[0],
    "int8": lambda signal: hidden_format(signal, "int8")[0],
    "threshold": sampled,
    "multinomial": lambda signal: sampled(signal, "multinomial", 20),
    "top 9": lambda signal: top_k(9),
    "all": lambda signal: top_k(VOCAB),
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_order_and_composition_of_a_batch_change_no_byte_of_a_document(make):
    signal = exact_signal(random_signal())
    format = make(signal)
    together = format.encode(signal, KEYS, COUNTS)
    ends = [0, *itertools.accumulate(COUNTS)]
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    order = [3, 4, 0, 2, 1]
    shuffled = signal._replace(hidden=torch.cat([signal.hidden[parts[i]] for i in order]))
    for i, found in zip(
        order, format.encode(shuffled, [KEYS[i] for i in order], [COUNTS[i] for i in order]), strict=True
    ):
        same(found, together[i])
    for i, part in enumerate(parts):
        alone = format.encode(signal._replace(hidden=signal.hidden[part]), KEYS[i : i + 1], COUNTS[i : i + 1])
        same(alone[0], together[i])


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_documents_have_what_their_streams_say(make):
    signal = random_signal()
    format = make(signal)
    for document, count in zip(format.encode(signal, KEYS, COUNTS), COUNTS, strict=True):
        assert document.keys() == format.streams.keys()
        for name, kind in format.streams.items():
            assert document[name].dtype == kind.dtype
            assert document[name].shape[1:] == kind.shape
            assert kind.ragged or len(document[name]) == count


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_documents_are_collated_in_any_number_also_none(tmp_path, make):
    signal = random_signal()
    format = make(signal)
    documents = through_files(tmp_path, format, format.encode(signal, KEYS, COUNTS))
    whole = format.collate(documents)
    assert all(len(tensor) == sum(COUNTS) for tensor in whole.values())
    for chosen in ([], [3], [1, 3], [2]):
        count, start = sum(COUNTS[i] for i in chosen), 0
        part = format.collate([documents[i] for i in chosen])
        assert part.keys() == whole.keys()
        for i in chosen:
            first = sum(COUNTS[:i])
            for name, tensor in part.items():
                assert len(tensor) == count
                assert tensor.dtype == whole[name].dtype
                own, expected = tensor[start : start + COUNTS[i]], whole[name][first : first + COUNTS[i]]
                if own.dim() == 2 and own.shape != expected.shape:  # as wide as its own rows need
                    assert not expected[:, own.shape[1] :].any()
                    expected = expected[:, : own.shape[1]]
                assert torch.equal(own, expected)
            start += COUNTS[i]


# --------------------------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("entries", [1, 9, VOCAB - 1, VOCAB, 10 * VOCAB])
def test_the_most_likely_tokens_are_kept_with_their_log_probabilities(tmp_path, head, entries):
    signal = random_signal(**head)
    probs = true_probs(signal)
    found = restored(tmp_path, top_k(entries), signal)
    count = min(entries, VOCAB)
    assert found.vocab_size == VOCAB
    assert found.ids.shape == (len(probs), count)
    values, ids = probs.topk(count)
    assert torch.equal(found.ids[:, 0].long(), ids[:, 0])
    assert [set(row) for row in found.ids.tolist()] == [set(row) for row in ids.tolist()]
    assert torch.allclose(found.log_probs.double(), values.log(), rtol=2**-10, atol=1e-5)
    if count == VOCAB:
        assert (found.log_tail == -torch.inf).all()
    else:
        tail = probs.scatter(1, ids, 0).sum(-1).log()
        assert torch.allclose(found.log_tail.double(), tail, rtol=2**-10, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ fidelity


@pytest.mark.parametrize("make", [FORMATS["threshold"], FORMATS["multinomial"], FORMATS["top 9"]])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fidelity_is_the_distance_of_what_is_stored(tmp_path, make, temperature):
    signal = random_signal()
    is_top = make is FORMATS["top 9"]
    format = top_k(9) if is_top else sampled(signal, "threshold" if make is sampled else "multinomial", 12, temperature)
    temperature = 1.0 if is_top else temperature
    found = sparse_fidelity(format, signal, VOCAB, temperature)
    count = len(signal.hidden)
    stored = format.signal(format.collate(format.encode(signal, [b"probe"], [count])), None)
    weights = stored.log_probs.exp() if is_top else stored.weights
    expected = dense(stored.ids, weights)
    known = weights.shape[1] * torch.ones(count) if is_top else stored.num_exact
    mass = sum(row[: int(number)].sum().item() for row, number in zip(weights, known, strict=True)) / count
    assert found["entries"] == pytest.approx((weights > 0).sum().item() / count)
    assert found["known_mass"] == pytest.approx(mass, abs=1e-6)
    error = ((expected - true_probs(signal, temperature)) ** 2).sum(-1).mean().item()
    assert found["squared_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_a_teacher_that_is_not_finite_is_refused(make, value):
    signal = random_signal()
    format = make(signal)
    signal.hidden[7, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        format.encode(signal, KEYS, COUNTS)


def test_tokens_past_the_vocabulary_of_a_store_are_noticed():
    signal = random_signal()
    format = sampled(signal)
    documents = format.encode(signal, KEYS, COUNTS)
    format.vocab_size = 290  # as many bits
    with pytest.raises(ValueError, match=r"has token 29\d, and there are 290"):
        format.collate(documents)


def test_masked_tokens_have_no_probability(tmp_path):
    bias = torch.zeros(ROWS)
    bias[20:VOCAB] = -torch.inf
    signal = random_signal(bias=bias)
    found = restored(tmp_path, top_k(30), signal)
    assert (found.ids[:, :20] < 20).all()
    assert torch.allclose(found.log_probs[:, :20].exp().sum(-1), torch.ones(len(found.ids)), atol=2**-9)
    assert (found.log_probs[:, 20:] == -10_000).all()
    found = restored(tmp_path, sampled(signal, entries=30), signal)
    assert (found.ids < 20).all()
