"""Losses between two vocabularies against enumerated token sequences, in float64, from texts instead of names."""

import functools
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses.cross_tokenizer import Spans, cross_tokenizer_loss, uld
from hf_distill.losses.divergence import DIVERGENCES
from hf_distill.losses.fused_linear import Head, fused_linear_distillation_loss
from hf_distill.token_alignment import UNNAMED, SharedTokens, align, group_numbers, shared_tokens
from tests.losses.live import Live
from tests.losses.oracle import ORACLE, alpha_beta

# Markers are words, everything else is text; None is no token. "abc" is only the student's, "bca" only the teacher's.
VOCABULARIES = {
    "every token has a name": (
        ["a", "b", "ab", "c", "eos", "abc", "ca", "<pad>"],
        ["c", "ba", "a", "<x>", "bc", "b", None, "eos", "bca", "abca"],
    ),
    "both have tokens without a name": (["a", "ab", "eos", "b", "cc", "ccc"], ["b", "a", "ba", "eos", "c", "cb", "ca"]),
    "only the teacher has": (["a", "b", "ab", "eos"], ["a", "b", "ba", "cb", "eos", "c"]),
    "only the student has": (["a", "b", "ab", "c", "cb", "eos"], ["b", "a", "ba", "bb", "eos"]),
    "nothing is shared": (["aa", "ab", "ba"], ["a", "b"]),
}
MARKERS = ("eos", "<pad>", "<x>")
STUDENT_WIDTH, TEACHER_WIDTH = 5, 4


def pieces_of(vocabulary):
    return [token if token is None or token in MARKERS else token.encode() for token in vocabulary]


def cut(text, vocabulary, generator):
    """A random way to write `text` with tokens of a vocabulary, as ids; None if there is none."""
    if not text:
        return []
    fitting = [i for i, token in enumerate(vocabulary) if token and token not in MARKERS and text.startswith(token)]
    for k in torch.randperm(len(fitting), generator=generator).tolist():
        rest = cut(text[len(vocabulary[fitting[k]]) :], vocabulary, generator)
        if rest is not None:
            return [fitting[k], *rest]
    return None


class Case:
    """One or two random texts in two random tokenisations, with random heads and hidden states."""

    def __init__(self, vocabularies, seed=0, rows=2, length=8, dtype=torch.float64):
        self.vocabularies = vocabularies
        self.generator = torch.Generator().manual_seed(seed)
        student_pieces, teacher_pieces = map(pieces_of, vocabularies)
        tokens, groups = ([], []), ([], [])
        for row in range(rows):
            ids = self.random_ids(length)
            sides = [[pieces_of(v)[i] for i in side] for v, side in zip(vocabularies, ids, strict=True)]
            for k, numbers in enumerate(group_numbers(align(*sides), *([True] * len(side) for side in sides))):
                tokens[k].extend(ids[k])
                groups[k].extend(number if number < 0 else number + 1000 * row for number in numbers)
        self.spans = Spans(*(torch.tensor(x) for k in (0, 1) for x in (tokens[k], groups[k])))
        self.shared = shared_tokens(student_pieces, teacher_pieces)
        sizes = [len(v) for v in vocabularies]
        self.student_hidden = self.randn(len(tokens[0]), STUDENT_WIDTH).to(dtype)
        self.student_weight = self.randn(sizes[0], STUDENT_WIDTH).to(dtype)
        self.student_bias = self.randn(sizes[0]).to(dtype)
        self.teacher_hidden = self.randn(len(tokens[1]), TEACHER_WIDTH).to(dtype)
        self.teacher_head = Head(self.randn(sizes[1], TEACHER_WIDTH).to(dtype), logit_scale=0.7)
        self.labels = self.spans.student_tokens.clone()
        self.labels[::4] = -100

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def random_ids(self, length):
        letters = sorted(set("".join(t for v in self.vocabularies for t in v if t and t not in MARKERS)))
        while True:
            text = "".join(
                letters[i] for i in torch.randint(len(letters), (length,), generator=self.generator).tolist()
            )
            ids = [cut(text, v, self.generator) for v in self.vocabularies]
            if None not in ids:
                ends = [[v.index("eos")] if "eos" in v else [] for v in self.vocabularies]
                return [side + end for side, end in zip(ids, ends, strict=True)]

    def loss(self, *leaves, **settings):
        hidden, weight, bias = leaves or (self.student_hidden, self.student_weight, self.student_bias)
        return cross_tokenizer_loss(
            hidden, Head(weight, bias), self.teacher_hidden, self.teacher_head, self.labels, self.spans, self.shared,
            **settings,
        )  # fmt: skip

    def leaves(self):
        leaves = self.student_hidden, self.student_weight, self.student_bias
        return [leaf.clone().requires_grad_() for leaf in leaves]

    def gradients(self, **settings):
        leaves = self.leaves()
        result = self.loss(*leaves, **settings)
        return result, torch.autograd.grad(result.loss, leaves)


# ------------------------------------------------------------------------------------------------------- the oracle


def compared(token, vocabulary, other):
    """Whether a token takes part: no marker of one side alone, and a token at all."""
    return token is not None and (token not in MARKERS or (token in vocabulary and token in other))


def name_of(token, shared):
    if token in MARKERS:
        return token
    beginnings = [token[:n] for n in range(1, len(token) + 1) if token[:n] in shared]
    return beginnings[-1] if beginnings else None


def enumerated(path, text, single, vocabulary, other):
    """Masses of outcomes from all sequences as long as the group's own, `path` [(token, log_probs of its position)].

    What the model says off the path is drawn at random: it must not matter.
    """
    shared = {t for t in vocabulary if t in other and t is not None}
    own = [token for token, _ in path]
    takes_part = torch.tensor([compared(token, vocabulary, other) for token in vocabulary])
    masses, unnamed = {}, [torch.zeros((), dtype=torch.float64) for _ in vocabulary]
    for sequence in itertools.product(range(len(vocabulary)), repeat=len(path)):
        mass = torch.ones((), dtype=torch.float64)
        for position, token in enumerate(sequence):
            if list(sequence[:position]) == own[:position]:
                mass = mass * path[position][1].exp()[token]
            else:
                seed = hash(sequence[:position]) % 2**31
                off = torch.rand(len(vocabulary), generator=torch.Generator().manual_seed(seed)).double() * takes_part
                mass = mass * (off / off.sum())[token]
        if not takes_part[sequence[0]]:
            continue
        if list(sequence) == own:
            outcome = text if single and text in shared else ("text", text)
        else:
            outcome = name_of(vocabulary[sequence[0]], shared)
        if outcome is None:
            unnamed[sequence[0]] = unnamed[sequence[0]] + mass
        masses[outcome] = masses.get(outcome, 0) + mass
    rest = [mass for mass, token in zip(unnamed, vocabulary, strict=True)
            if compared(token, vocabulary, other) and name_of(token, shared) is None]  # fmt: skip
    return masses, torch.stack(rest) if rest else torch.zeros(0, dtype=torch.float64)


def sorted_distance(student, teacher):
    student, teacher = (torch.cat([x, x.new_zeros(50 - len(x))]).sort().values for x in (student, teacher))
    return (student - teacher).abs().sum()


def log_probs(hidden, weight, bias, scale, temperature, vocabulary, other):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale / temperature
    outside = [i for i, token in enumerate(vocabulary) if not compared(token, vocabulary, other)]
    logits = logits.clone()
    logits[:, outside] = -math.inf
    return logits.log_softmax(-1)


def oracle(case, leaves, *, kd_weight, temperature, method="aligned", divergence="forward_kl", num_items=None):
    """The loss by its definition, on dense logits and enumerated sequences."""
    students, teachers = case.vocabularies
    head = case.teacher_head
    q = log_probs(*leaves, 1.0, temperature, students, teachers)
    p = log_probs(case.teacher_hidden, head.weight, None, head.logit_scale, temperature, teachers, students)
    spans, total = case.spans, 0
    for number in sorted(set(spans.student_groups.tolist()) & set(spans.teacher_groups.tolist()) - {-1}):
        paths = [
            [(tokens[i].item(), log_probs[i]) for i in (groups == number).nonzero().flatten().tolist()]
            for tokens, groups, log_probs in (
                (spans.student_tokens, spans.student_groups, q),
                (spans.teacher_tokens, spans.teacher_groups, p),
            )
        ]
        if method == "uld":
            total = total + temperature * sorted_distance(paths[0][0][1].exp(), paths[1][0][1].exp())
            continue
        text = "".join(students[token] for token, _ in paths[0])
        assert text == "".join(teachers[token] for token, _ in paths[1])
        single = 1 in map(len, paths)
        masses, rest = enumerated(paths[0], text, single, students, teachers)
        teacher_masses, teacher_rest = enumerated(paths[1], text, single, teachers, students)
        for x in (masses, teacher_masses):
            assert sum(x.values()).item() == pytest.approx(1)
        if len(rest) and len(teacher_rest):
            total = total + temperature * sorted_distance(rest, teacher_rest)
        else:
            masses.pop(None, None), teacher_masses.pop(None, None)
        tiny = torch.tensor(1e-300, dtype=torch.float64)
        outcomes = [k for k in masses | teacher_masses if masses.get(k, 0) + teacher_masses.get(k, 0) > 0]
        first, second = (torch.stack([x.get(k, tiny) + tiny for k in outcomes]) for x in (masses, teacher_masses))
        factor = temperature if divergence == "total_variation" else temperature**2
        total = total + factor * ORACLE[divergence](second / second.sum(), first / first.sum())
    logits = leaves[0] @ leaves[1].T + leaves[2]
    ce = F.cross_entropy(logits, case.labels, ignore_index=-100, reduction="sum")
    return (kd_weight * total + (1 - kd_weight) * ce) / (num_items or len(case.labels))


def assert_equals_oracle(case, chunk_size=None, **settings):
    leaves = case.leaves()
    expected = oracle(case, leaves, **settings)
    result, found = case.gradients(chunk_size=chunk_size, **settings)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for gradient, truth in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-10)


def lengths(groups):
    return torch.bincount(groups[groups >= 0]).tolist()


# ------------------------------------------------------------------------------------------------- the definitions


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_aligned_loss_and_gradients_equal_enumerated_sequences(vocabularies, divergence):
    for seed, temperature in ((0, 1.0), (1, 2.0), (2, 0.6)):
        case = Case(VOCABULARIES[vocabularies], seed)
        assert_equals_oracle(
            case, chunk_size=seed + 2, kd_weight=0.4, temperature=temperature, divergence=divergence, num_items=9
        )


@pytest.mark.parametrize(("alpha", "beta"), [(-0.5, 0.2), (0.3, -0.5)])
@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_negative_powers_leave_out_what_neither_side_can_say(vocabularies, alpha, beta, monkeypatch):
    monkeypatch.setitem(ORACLE, "alpha_beta", functools.partial(alpha_beta, alpha=alpha, beta=beta))
    monkeypatch.setitem(DIVERGENCES, "alpha_beta", functools.partial(DIVERGENCES["alpha_beta"], alpha=alpha, beta=beta))
    assert_equals_oracle(Case(VOCABULARIES[vocabularies]), kd_weight=0.4, temperature=1.5, divergence="alpha_beta")


def test_the_cases_hold_groups_of_every_shape():
    """One to one, one to many, many to one, many to many."""
    shapes = set()
    for vocabularies, seed in itertools.product(VOCABULARIES.values(), range(3)):
        spans = Case(vocabularies, seed).spans
        pairs = zip(lengths(spans.student_groups), lengths(spans.teacher_groups), strict=False)
        shapes |= {(min(m, 2), min(n, 2)) for m, n in pairs}
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= shapes


@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_uld_loss_and_gradients_equal_sorting_by_hand(vocabularies):
    for seed, temperature in ((0, 1.0), (1, 2.0)):
        case = Case(VOCABULARIES[vocabularies], seed)
        assert_equals_oracle(case, chunk_size=3, kd_weight=0.7, temperature=temperature, method="uld")


def test_uld_of_two_distributions_by_hand():
    student, teacher = torch.tensor([[0.1, 0.6, 0.3]]), torch.tensor([[0.2, 0.5, 0.1, 0.2]])
    assert uld(student, teacher).item() == pytest.approx(0.1 + 0.1 + 0.1 + 0.1)
    assert uld(teacher, student).item() == pytest.approx(0.4)
    assert uld(torch.eye(3), torch.eye(5)[:3]).abs().max() == 0


def test_uld_gradient_equals_finite_differences():
    torch.manual_seed(0)
    logits, teacher = torch.randn(4, 6).double().requires_grad_(), torch.randn(4, 9).double().softmax(-1)
    assert torch.autograd.gradcheck(lambda x: uld(x.softmax(-1), teacher), logits)


POWERS = [(-0.5, 0.2), (2.0, -3.0), (-1.0, 0.0), (0.0, -1.0), (1.0, -1.0), (-1.0, 2.0), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("divergence", "params"),
    [*((name, None) for name in DIVERGENCES), *(("alpha_beta", {"alpha": a, "beta": b}) for a, b in POWERS)],
)
def test_equal_tokenizers_give_the_plain_loss(divergence, params):
    """Value, sums and gradients of fused_linear_distillation_loss, for every divergence."""
    torch.manual_seed(0)
    rows, vocab = 11, 29
    hidden, weight = torch.randn(rows, 6).double(), torch.randn(vocab, 6).double()
    teacher_hidden, teacher_weight = torch.randn(rows, 4).double(), torch.randn(vocab, 4).double()
    tokens, groups, ids = torch.randint(vocab, (rows,)), torch.randperm(rows), torch.arange(vocab)
    labels = tokens.masked_fill(groups == 3, -100)
    settings = {"kd_weight": 0.3, "temperature": 1.5, "divergence": divergence, "divergence_params": params}
    results, gradients = [], []
    for cross in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if cross:
            spans = Spans(tokens, groups, tokens, groups)
            heads = Head(leaves[1]), Head(teacher_weight)
            result = cross_tokenizer_loss(
                leaves[0], heads[0], teacher_hidden, heads[1], labels, spans, SharedTokens(*[ids] * 4), **settings
            )
        else:
            result = fused_linear_distillation_loss(*leaves, teacher_hidden, teacher_weight, labels, **settings)
        results.append(torch.stack([value.detach() for value in result[:6]]))
        gradients.append(torch.autograd.grad(result.loss, leaves))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_loss_is_zero_for_a_student_that_says_the_same_in_a_permuted_vocabulary(method):
    """And above zero for any other."""
    students = VOCABULARIES["every token has a name"][0]
    order = torch.randperm(len(students), generator=torch.Generator().manual_seed(3))
    case = Case((students, [students[i] for i in order]))
    position = order.argsort()
    tokens, groups = case.spans.student_tokens, torch.arange(len(case.labels))
    case.spans = Spans(tokens, groups, position[tokens], groups)
    case.teacher_hidden, case.teacher_head = case.student_hidden, Head(case.student_weight[order])
    case.student_bias = torch.zeros_like(case.student_bias)
    result, gradients = case.gradients(kd_weight=1.0, method=method)
    assert abs(result.kd.item()) < 1e-13
    if method == "aligned":  # the gradient of |x| at a rounded 0 can be that of either side
        assert all(gradient.abs().max() < 1e-13 for gradient in gradients)
    assert result.agreement.item() == len(case.labels)
    case.student_weight = case.student_weight + 0.1 * case.randn(*case.student_weight.shape)
    assert case.loss(method=method).kd.item() > 1e-4


def test_what_only_one_side_can_say_is_left_out():
    """The loss is 0 whatever the probability of the teacher's token that begins with nothing the student has."""
    students = VOCABULARIES["every token has a name"][0]
    case = Case((students, students))
    case.shared = shared_tokens(pieces_of(students), [*pieces_of(students), b"x"])
    case.student_bias = torch.zeros_like(case.student_bias)
    groups = torch.arange(len(case.labels))
    case.spans = Spans(case.spans.student_tokens, groups, case.spans.student_tokens, groups)
    case.teacher_hidden = case.student_hidden
    case.teacher_head = Head(torch.cat([case.student_weight, case.randn(1, STUDENT_WIDTH)]))
    assert abs(case.loss().kd.item()) < 1e-13


@pytest.mark.parametrize("method", ["aligned", "uld"])
@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_loss_is_never_negative(vocabularies, method):
    for seed in range(20):
        case = Case(VOCABULARIES[vocabularies], seed, dtype=torch.float32)
        case.student_weight *= 4
        assert case.loss(method=method).kd.item() >= -1e-6


def test_sums_are_those_of_all_positions_and_of_all_groups():
    case = Case(VOCABULARIES["every token has a name"])
    result = case.loss()
    logits = case.student_hidden @ case.student_weight.T + case.student_bias
    assert result.ce.item() == pytest.approx(F.cross_entropy(logits, case.labels, reduction="sum").item())
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    assert result.student_entropy.item() == pytest.approx(entropy.item())
    assert not any(value.requires_grad for value in result[1:6])
    leaves = [case.student_hidden, case.student_weight, case.student_bias]
    kd = oracle(case, leaves, kd_weight=1.0, temperature=1.0, num_items=1)
    assert result.kd.item() == pytest.approx(kd.item())


@pytest.mark.parametrize("method", ["aligned", "uld"])
@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_agreement_counts_equal_texts_where_one_token_faces_one(vocabularies, method):
    """From texts, not names: a likeliest token that only begins with the other side's is another text."""
    students, teachers = VOCABULARIES[vocabularies]
    for seed in range(4):
        case = Case((students, teachers), seed)
        case.student_weight[students.index("abc" if "abc" in students else students[0])] *= 3
        result, spans = case.loss(method=method), case.spans
        q = log_probs(case.student_hidden, case.student_weight, case.student_bias, 1, 1, students, teachers)
        p = log_probs(case.teacher_hidden, case.teacher_head.weight, None, 0.7, 1, teachers, students)
        paired = agreed = 0
        for number in set(spans.student_groups.tolist()) & set(spans.teacher_groups.tolist()) - {-1}:
            mine, theirs = ((x == number).nonzero().flatten() for x in (spans.student_groups, spans.teacher_groups))
            if len(mine) == len(theirs) == 1:
                paired += 1
                agreed += students[q[mine[0]].argmax()] == teachers[p[theirs[0]].argmax()]
        assert (result.num_paired.item(), result.agreement.item()) == (paired, agreed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_another_text_keeps_its_digits_where_the_groups_own_is_certain(temperature, dtype):
    """The student writes "ab" in two tokens: 1 - q(b) is 0 in float32, but q(a) in its place has a logarithm."""
    students, teachers = ["a", "b"], ["a", "b", "ab"]
    hidden = torch.tensor([[10.0, 0.0], [0.0, 30.0]], dtype=dtype, requires_grad=True)  # the logits
    teacher_logits = torch.tensor([[1.0, 0.0, 2.0]], dtype=dtype) * temperature
    result = cross_tokenizer_loss(
        hidden, Head(torch.eye(2, dtype=dtype)), teacher_logits, Head(torch.eye(3, dtype=dtype)), torch.tensor([0, 1]),
        Spans(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([2]), torch.tensor([0])),
        shared_tokens(pieces_of(students), pieces_of(teachers)),
        kd_weight=1.0, temperature=temperature, num_items=1,
    )  # fmt: skip
    result.loss.backward()

    exact = hidden.detach().double().requires_grad_()
    first, second = (exact / temperature).log_softmax(-1)
    log_p = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64).log_softmax(-1)
    log_q = torch.stack([first[0] + second[0], first[1], first[0] + second[1]])  # "aa", "b", "ab"
    expected = (log_p.exp() * (log_p - log_q)).sum()
    (temperature**2 * expected).backward()
    assert result.kd.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1000.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_float32_keeps_its_digits_at_any_temperature(divergence, temperature):
    """Against float64."""
    settings = {"kd_weight": 1.0, "temperature": temperature, "divergence": divergence}
    for vocabularies in list(VOCABULARIES.values())[:2]:
        found, gradients = Case(vocabularies, dtype=torch.float32).gradients(**settings)
        case = Case(vocabularies, dtype=torch.float32)
        for name in ("student_hidden", "student_weight", "student_bias", "teacher_hidden"):
            setattr(case, name, getattr(case, name).double())
        case.teacher_head = case.teacher_head._replace(weight=case.teacher_head.weight.double())
        expected, truths = case.gradients(**settings)
        assert found.kd.item() == pytest.approx(expected.kd.item(), rel=2e-3)
        for gradient, truth in zip(gradients, truths, strict=True):
            assert (gradient.double() - truth).norm() < 5e-3 * truth.norm()


# ------------------------------------------------------------------------------------------------------- invariances


@pytest.fixture
def case():
    return Case(VOCABULARIES["both have tokens without a name"], rows=3)


SETTINGS = {"kd_weight": 0.6, "temperature": 1.3, "num_items": 5}


def assert_same(case, other, method, **settings):
    result, gradients = case.gradients(method=method, **SETTINGS)
    found, found_gradients = other.gradients(method=method, **SETTINGS, **settings)
    torch.testing.assert_close(torch.stack(found[1:6]), torch.stack(result[1:6]), rtol=1e-11, atol=1e-11)
    assert found.loss.item() == pytest.approx(result.loss.item(), rel=1e-12)
    rows = len(case.student_weight)
    found_gradients = [found_gradients[0][: len(case.labels)], found_gradients[1][:rows], found_gradients[2][:rows]]
    for gradient, truth in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_chunks_and_blocks_do_not_matter(case, method, monkeypatch):
    for chunk_size, block in itertools.product((1, 2, 7, 1000), (1, 13, 10**6)):
        monkeypatch.setattr("hf_distill.losses.head.CACHE_BLOCK", block)
        assert_same(case, case, method, chunk_size=chunk_size)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_numbers_of_groups_and_the_order_of_rows_do_not_matter(case, method):
    other = Case(VOCABULARIES["both have tokens without a name"], rows=3)
    rename = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    spans = other.spans
    student, teacher = (torch.where(x >= 0, rename[x], -1) for x in (spans.student_groups, spans.teacher_groups))
    order = (spans.teacher_groups.clamp(min=0) // 1000).argsort(descending=True, stable=True)  # rows from behind
    other.spans = Spans(spans.student_tokens, student, spans.teacher_tokens[order], teacher[order])
    other.teacher_hidden = other.teacher_hidden[order]
    assert_same(case, other, method)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_padded_heads_and_positions_without_a_group_do_not_matter(case, method):
    other = Case(VOCABULARIES["both have tokens without a name"], rows=3)
    padding = torch.full((4, 5), 7.0).double()
    other.student_weight = torch.cat([other.student_weight, padding])
    other.student_bias = torch.cat([other.student_bias, padding[:, 0]])
    other.teacher_head = other.teacher_head._replace(weight=torch.cat([other.teacher_head.weight, padding[:, :4]]))
    other.teacher_hidden = torch.cat([other.teacher_hidden, padding[:, :4]])
    spans, none = other.spans, torch.full((4,), -1)
    other.spans = spans._replace(
        teacher_tokens=torch.cat([spans.teacher_tokens, none + 1]),
        teacher_groups=torch.cat([spans.teacher_groups, none]),
    )
    assert_same(case, other, method)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_a_permuted_vocabulary_of_the_teacher_does_not_matter(case, method):
    students, teachers = case.vocabularies
    order = torch.randperm(len(teachers), generator=torch.Generator().manual_seed(1))
    other = Case(VOCABULARIES["both have tokens without a name"], rows=3)
    other.shared = shared_tokens(pieces_of(students), pieces_of([teachers[i] for i in order]))
    other.teacher_head = other.teacher_head._replace(weight=other.teacher_head.weight[order])
    other.spans = other.spans._replace(teacher_tokens=order.argsort()[other.spans.teacher_tokens])
    assert_same(case, other, method)


def test_a_group_that_one_side_lacks_is_left_out(case):
    spans = case.spans
    number = spans.teacher_groups[-1]
    without = spans._replace(
        student_groups=spans.student_groups.masked_fill(spans.student_groups == number, -1),
        teacher_groups=spans.teacher_groups.masked_fill(spans.teacher_groups == number, -1),
    )
    results = []
    for changed in (without, without._replace(teacher_groups=spans.teacher_groups)):
        case.spans = changed
        results.append(case.loss().loss)
    assert torch.equal(*results)


def test_a_marker_of_the_student_alone_is_a_hard_label_and_nothing_else():
    case = Case(VOCABULARIES["every token has a name"])
    before, _ = case.gradients(**SETTINGS)
    marker = case.vocabularies[0].index("<pad>")
    case.student_hidden = torch.cat([case.student_hidden, case.randn(1, STUDENT_WIDTH)])
    case.labels = torch.cat([case.labels, torch.tensor([marker])])
    case.spans = case.spans._replace(
        student_tokens=torch.cat([case.spans.student_tokens, torch.tensor([marker])]),
        student_groups=torch.cat([case.spans.student_groups, torch.tensor([-1])]),
    )
    after, gradients = case.gradients(**SETTINGS)
    logits = case.student_hidden[-1] @ case.student_weight.T + case.student_bias
    assert after.ce.item() - before.ce.item() == pytest.approx(-logits.log_softmax(-1)[marker].item())
    assert after.kd.item() == pytest.approx(before.kd.item(), rel=1e-14)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_tokens_count_in_groups_where_they_are_no_hard_label(case):
    """A student's own samples have no hard labels."""
    with_labels = case.loss()
    case.labels = torch.full_like(case.labels, -100)
    without = case.loss()
    assert without.ce.item() == 0
    assert torch.equal(without.kd, with_labels.kd)


def test_a_global_divisor_makes_parts_of_a_batch_add_up_to_the_batch():
    case = Case(VOCABULARIES["every token has a name"])
    whole = case.loss(num_items=17).loss
    spans, parts = case.spans, []
    for row in (0, 1):
        mine = [((x.clamp(min=0) // 1000) == row) & (x >= 0) for x in (spans.student_groups, spans.teacher_groups)]
        assert all(x.any() for x in mine)
        part = Case(VOCABULARIES["every token has a name"])
        part.student_hidden, part.labels = part.student_hidden[mine[0]], part.labels[mine[0]]
        part.teacher_hidden = part.teacher_hidden[mine[1]]
        part.spans = Spans(*(x[mine[k // 2]] for k, x in enumerate(spans)))
        parts.append(part.loss(num_items=torch.tensor(17)).loss)
    assert (spans.student_groups >= 0).all()
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


# ---------------------------------------------------------------------------------------------- memory and precision


def many_groups(vocab, teacher_vocab, num_shared, rows=300):
    """Arguments of a loss with groups of one to one, one to many and many to many tokens."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    teacher_weight, ids = torch.randn(teacher_vocab, 4), torch.arange(num_shared)

    def names(size):
        numbers = torch.arange(size)
        found = torch.where(numbers < num_shared, numbers, numbers % (num_shared // 2))
        found[num_shared + (size - num_shared) // 2 :] = UNNAMED
        return found

    tokens = torch.randint(num_shared, (rows,))
    spans = Spans(tokens, torch.arange(rows) // 3, tokens, torch.arange(rows) // 2)
    shared = SharedTokens(ids, ids, names(vocab), names(teacher_vocab))
    return hidden, Head(weight), hidden.detach(), Head(teacher_weight), tokens, spans, shared


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_no_tensor_of_all_logits_is_ever_made(method):
    """The largest tensor that any operation returns is one chunk of logits, or the head's gradient."""
    vocab, chunk_size = 1000, 16
    with Live() as live:
        cross_tokenizer_loss(*many_groups(vocab, vocab, 600), method=method, chunk_size=chunk_size).loss.backward()
    assert live.largest <= chunk_size * vocab


@pytest.mark.parametrize("sizes", [(1000, 1000, 980), (1000, 600, 590), (600, 1000, 400)])
@pytest.mark.parametrize("name", [*DIVERGENCES, "uld"])
def test_three_chunks_of_logits_are_alive_at_most(name, sizes):
    """Those of both sides, and all that the element-wise part holds of its blocks."""
    chunk_size = 128
    settings = {"method": "uld"} if name == "uld" else {"divergence": name}
    with Live(min(sizes)) as live:
        cross_tokenizer_loss(*many_groups(*sizes), temperature=2.0, chunk_size=chunk_size, **settings).loss.backward()
    assert live.most_bytes < 3 * chunk_size * max(sizes) * 4


def test_a_frozen_head_gets_no_gradient_and_nothing_does_under_no_grad(case):
    hidden = case.student_hidden.clone().requires_grad_()
    result, gradients = case.gradients()
    case.loss(hidden, case.student_weight, case.student_bias).loss.backward()
    torch.testing.assert_close(hidden.grad, gradients[0], rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        found = case.loss(*case.leaves())
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, result.loss.detach())


def test_a_second_backward_is_refused(case):
    loss = case.loss(*case.leaves()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("method", ["aligned", "uld"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_float32_sums(dtype, method):
    low = Case(VOCABULARIES["both have tokens without a name"], dtype=dtype)
    exact = Case(VOCABULARIES["both have tokens without a name"])
    for name in ("student_hidden", "student_weight", "student_bias", "teacher_hidden"):
        setattr(exact, name, getattr(low, name).double())
    exact.teacher_head = low.teacher_head._replace(weight=low.teacher_head.weight.double())
    found, gradients = low.gradients(method=method, **SETTINGS)
    expected, expected_gradients = exact.gradients(method=method, **SETTINGS)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert ((gradient.double() - truth).norm() / truth.norm()).item() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_products_of_both_sides_are_in_the_dtype_of_autocast(product_dtypes, method):
    case = Case(VOCABULARIES["both have tokens without a name"], dtype=torch.float32)
    _, gradients = case.gradients(method=method, chunk_size=5)
    assert product_dtypes == {STUDENT_WIDTH: {torch.float64}, TEACHER_WIDTH: {torch.float64}}
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("method", ["aligned", "uld"])
@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_extreme_logits_give_finite_values_and_gradients(vocabularies, method):
    """One-hot distributions whose small probabilities underflow in float32."""
    for seed in range(5):
        case = Case(VOCABULARIES[vocabularies], seed, dtype=torch.float32)
        case.student_weight *= 100
        case.teacher_hidden *= 100
        result, gradients = case.gradients(method=method, kd_weight=1.0)
        assert result.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_no_groups_leave_the_hard_labels_and_no_rows_nothing(case, method):
    case.spans = case.spans._replace(student_groups=torch.full_like(case.labels, -1))
    result, gradients = case.gradients(method=method, kd_weight=0.5)
    assert result.kd.item() == 0
    assert result.loss.item() == pytest.approx(0.5 * result.ce.item() / len(case.labels))
    assert gradients[0].abs().max() > 0
    case.labels, case.student_hidden = case.labels[:0], case.student_hidden[:0]
    case.spans = Spans(*(x[:0] for x in case.spans[:2]), *case.spans[2:])
    result, gradients = case.gradients(method=method)
    assert result.loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kd_weight": 1.5}, r"kd_weight has to lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature"),
        ({"method": "gold"}, "one of aligned, uld"),
        ({"divergence": "kl"}, "choose one of"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"labels": torch.zeros(3).long()}, r"labels has shape \(3,\)"),
        ({"student_hidden": torch.zeros(3, 9)}, "student_hidden has to be"),
        ({"teacher_hidden": torch.zeros(3, TEACHER_WIDTH)}, "teacher_tokens has shape"),
        ({"student_head": Head(torch.zeros(2, STUDENT_WIDTH))}, "6 tokens of the student, its head has 2 rows"),
        (
            {"shared": SharedTokens(torch.zeros(1).long(), *[torch.zeros(2).long()] * 3)},
            "1 tokens of the student for 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(case, change, message):
    arguments = {
        "student_hidden": case.student_hidden, "student_head": Head(case.student_weight),
        "teacher_hidden": case.teacher_hidden, "teacher_head": case.teacher_head, "labels": case.labels,
        "spans": case.spans, "shared": case.shared, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cross_tokenizer_loss(**arguments)
