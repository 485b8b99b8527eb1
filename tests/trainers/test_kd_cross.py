"""KDTrainer with teachers that have another tokenizer.

Two truths. A teacher that only has other ids for the same tokens gives the update of the teacher without them, and with
a tokenizer of its own the update is the one by hand: every row read alone, in float64, the groups found by comparing
the byte offsets of tokens, the loss as the formulas in `losses/cross_tokenizer.py` have it.
Shapes: T and Tt tokens of student and teacher, V vocabulary, K names.
"""

import copy
import itertools
import json
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from hf_distill import KDConfig, KDTrainer
from hf_distill.teachers.across import AcrossTeacher
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.losses.oracle import ORACLE
from tests.trainers.test_kd import VOCAB, Gradients, assert_same_gradients, dense_gradients, settings

SPLITS = [(8, 1), (4, 2), (2, 4)]  # batch size and accumulation steps of one and the same update
OPTIONS = {"temperature": 2.0, "kd_weight": 0.7}
NAMES = ("loss", "kd", "ce", "agreement")


# ------------------------------------------------------------------------------------------------ what the tests share


def make_trainer(folder, student, teacher, tokenizers, dataset, split=(8, 1), held_out=None, **changes):
    """A trainer of a copy of the student, and what will have the gradients of its updates."""
    size, steps = split
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **OPTIONS, **changes}
    capture = Gradients()
    trainer = KDTrainer(
        copy.deepcopy(student), teacher, KDConfig(**settings(folder, **options)), dataset, held_out, tokenizers[0],
        teacher_processing_class=tokenizers[1], callbacks=[capture],
    )  # fmt: skip
    return trainer, capture


def update(*args, **changes):
    """Gradients and log of the first update."""
    trainer, capture = make_trainer(*args, **changes)
    trainer.train()
    return capture.first, trainer.state.log_history[0]


def evaluations(trainer, sizes):
    for size in sizes:
        trainer.args.per_device_eval_batch_size = size
        yield trainer.evaluate()


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# Ragged, and parted anywhere, also inside of words.
TEXTS = [" ".join(text.split()[: 5 + i]) for i, text in enumerate(SENTENCES)]
PARTED = [(text[: 7 + 3 * i], text[7 + 3 * i :]) for i, text in enumerate(TEXTS)]
# Short answers, the same ones again, white space that templates take away, words of the templates.
CHATS = [
    turns("Did Tom see a fish?", "No."),
    turns(" Where is the train? \n", "It leaves at nine, and we must not be late.\n"),
    turns("Yes?", "Yes.", "Yes?", "Yes."),
    turns("You are kind.", "So are you.", "Is the user a dog?", "a dog"),
    turns(TEXTS[4], TEXTS[5]),
    turns(TEXTS[5], "I", "Person:", TEXTS[6]),
    turns("A bird", "sat on the fence"),
    turns("When?", "  At nine."),
]
DATASETS = {
    "text": Dataset.from_dict({"text": TEXTS}),
    "completion": Dataset.from_list([{"prompt": prompt, "completion": rest} for prompt, rest in PARTED]),
    "messages": Dataset.from_dict({"messages": CHATS}),
    "answer": Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]),
}


# ------------------------------------------------------------------------------------- the same tokens with other ids


@pytest.fixture(scope="module")
def order():
    """The teacher's id of each of the student's tokens."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def permuted_tokenizer(tokenizer, order):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: order[i].item() for token, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = order[token["id"]].item()
    permuted = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>", pad_token="<pad>"
    )
    permuted.chat_template = tokenizer.chat_template
    return permuted


@pytest.fixture(scope="module")
def teacher():
    return make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3)


@pytest.fixture(scope="module")
def permuted_teacher(teacher, order):
    permuted = copy.deepcopy(teacher)
    with torch.no_grad():
        for module in (permuted.get_input_embeddings(), permuted.get_output_embeddings()):
            module.weight[order] = module.weight.clone()
    return permuted


@pytest.fixture(scope="module")
def student():
    return make_model("llama", seed=2)


def test_permuted_ids_are_another_vocabulary_for_the_same_texts(tokenizer, permuted_tokenizer, order):
    for text in [*TEXTS, "café 🍕<eos>"]:
        ids = tokenizer(text)["input_ids"]
        assert permuted_tokenizer(text)["input_ids"] == order[ids].tolist()
        assert permuted_tokenizer(text)["input_ids"] != ids


STRIPPED = [[{**turn, "content": turn["content"].strip()} for turn in chat] for chat in CHATS]
SAME_TOKENS = {
    "text": (DATASETS["text"], {}),
    "other scripts": (Dataset.from_dict({"text": ["Ein Käse 🍕🎉!", *TEXTS[1:7], "안녕하세요\n\n  naïve"]}), {}),
    "completion": (DATASETS["completion"], {}),
    "messages": (Dataset.from_dict({"messages": STRIPPED}), {}),
    "answer": (Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in STRIPPED]), {}),
    "answers among messages": (Dataset.from_dict({"messages": STRIPPED}), {"assistant_only_loss": True}),
    "cut text": (DATASETS["text"], {"max_length": 11}),
    "cut completion": (DATASETS["completion"], {"max_length": 17}),
    "cut messages": (Dataset.from_dict({"messages": [turns(*PARTED[i], TEXTS[i - 1], TEXTS[i - 3]) for i in range(8)]}),
                     {"max_length": 25}),
    "cut messages, the answer in the question": (
        Dataset.from_dict({"messages": [turns(f"{text} {text}", text[:6]) for text in TEXTS]}), {"max_length": 12}
    ),
    "stream": (DATASETS["completion"].to_iterable_dataset(), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME_TOKENS)
def test_permuted_ids_change_nothing(tmp_path, tokenizer, permuted_tokenizer, teacher, permuted_teacher, student, case):
    dataset, options = SAME_TOKENS[case]
    plain, capture = make_trainer(
        tmp_path, student, teacher, (tokenizer, tokenizer), dataset, held_out=dataset, **options
    )
    lengths = {len(row["input_ids"]) for row in plain.train_dataset}
    assert len(lengths) > 1 or case.startswith("cut")
    if options.get("max_length"):
        assert max(lengths) == options["max_length"]
    (expected_metrics,) = evaluations(plain, [8])
    plain.train()
    expected_log = plain.state.log_history[-2]
    for k, split in enumerate(SPLITS if case in ("completion", "messages") else SPLITS[1:2]):
        trainer, found = make_trainer(
            tmp_path, student, permuted_teacher, (tokenizer, permuted_tokenizer), dataset, split, dataset, **options
        )
        assert isinstance(trainer.teacher, AcrossTeacher)
        for metrics in evaluations(trainer, [3, 8, 1][k : k + 1]):
            assert metrics["eval_alignment/exact_fraction"] == 1
            for name in NAMES:
                assert metrics[f"eval_{name}"] == pytest.approx(expected_metrics[f"eval_{name}"], rel=1e-6)
        trainer.train()
        log = trainer.state.log_history[-2]
        assert log["alignment/exact_fraction"] == 1
        for name in NAMES:
            assert log[name] == pytest.approx(expected_log[name], rel=1e-6)
        assert_same_gradients(found.first, capture.first)


# ------------------------------------------------------------------------------- another tokenizer: two sides by hand

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# A name, a line of its own and the white space of contents are the template's.
META_TEMPLATE = (
    "{{ bos_token }}{{ 'You are kind.\\n' }}{% for message in messages %}"
    "{{ 'Robot:\\n' if message['role'] == 'assistant' else 'Person:\\n' }}{{ message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{{ 'Robot:\\n' if add_generation_prompt else '' }}"
)


class Marker(str):
    """A token without text; all others are written in the alphabet of byte-level tokenizers, one letter a byte."""


class Side(NamedTuple):
    """A tokenizer, how each of its tokens is written, and its chat template: what it puts around each content."""

    tokenizer: PreTrainedTokenizerFast
    tokens: list[str]
    beginning: str
    around: dict[str, tuple[str, str]]
    strips: bool = False

    def read(self, ids):
        """(token, its start in the text, its end) for each of `ids`."""
        tokens = [self.tokens[i] for i in ids]
        ends = list(itertools.accumulate((0 if isinstance(t, Marker) else len(t) for t in tokens), initial=0))
        return list(zip(tokens, ends, ends[1:], strict=False))

    def chat(self, messages, prompted=False):
        """Token ids of a conversation, and where each of its contents begins: bytes of the text without markers."""
        text, places = self.beginning, []
        for turn in messages:
            before, after = self.around[turn["role"]]
            content = turn["content"].strip() if self.strips else turn["content"]
            blank = len(content) - len(content.lstrip())
            places.append(len(self.without_markers(text + before)) + blank)
            text += before + content + after
        text += self.around["assistant"][0] if prompted else ""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"], places

    def without_markers(self, text):
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text


def spelled(tokenizer):
    roles = {tokenizer.eos_token: "eos", tokenizer.bos_token: "bos"}
    special = tokenizer.added_tokens_decoder
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in special:
            yield Marker(roles.get(token, token))
        elif isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            yield token
        else:
            yield BYTES.pre_tokenize_str(token.replace("▁", " "))[0][0]


@pytest.fixture(scope="module")
def byte_side():
    """A byte-level tokenizer without a beginning of text, with markers for roles."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    around = {role: (f"<|{role}|>", "<eos>") for role in ("user", "assistant")}
    return Side(tokenizer, list(spelled(tokenizer)), "", around)


@pytest.fixture(scope="module")
def meta_side():
    """One with `▁`, as Llama and Mistral have it: a space before a text, a beginning of text, fewer tokens."""
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    # No token holds text of a template and of a content, but for white space.
    corpus = [*SENTENCES, "Robot:\n", "Person:\n", "You are kind.\n", "When?\n", "Yes? No.", "Did he see the user?\n"]
    model.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=250, special_tokens=special))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = META_TEMPLATE
    around = {"user": ("Person:\n", "\n"), "assistant": ("Robot:\n", "</s>")}
    return Side(tokenizer, list(spelled(tokenizer)), "<s>You are kind.\n", around, strips=True)


class Row(NamedTuple):
    """What both sides read, and where each stretch that both say begins in their texts, and its length."""

    student_ids: list[int]
    labels: list[int]
    teacher_ids: list[int]
    places: list[tuple[int, int, int]]


def row_by_hand(row, student, teacher, max_length=None):
    """A row of one of the data sets, made with nothing but the tokenizers."""

    def encode(side, text, ends=True):
        return side.tokenizer(text)["input_ids"] + [side.tokenizer.eos_token_id] * ends

    completion, prompt_ids = row.get("completion"), []
    chat = row.get("messages") or (not isinstance(row.get("prompt", ""), str) and row["prompt"] + completion)
    if chat:
        ids, places = student.chat(chat)
        teacher_ids, teacher_places = teacher.chat(chat)
        lengths = [len(turn["content"].strip()) for turn in chat]
        places = list(zip(places, teacher_places, lengths, strict=True))
        if completion:
            prompt_ids, _ = student.chat(row["prompt"], prompted=True)
    else:
        text = row["text"] if completion is None else row["prompt"] + completion
        if completion:
            prompt_ids = encode(student, row["prompt"], ends=False)
        ids = encode(student, text)
        if cut := max_length is not None and max_length < len(ids):
            ids = ids[:max_length]
            text = text[: student.read(ids)[-1][2] - student.strips]
        teacher_ids = encode(teacher, text, ends=not cut)
        places = [(int(student.strips), int(teacher.strips), len(text))]
    start = next((i for i, pair in enumerate(zip(prompt_ids, ids, strict=False)) if len({*pair}) > 1), len(prompt_ids))
    return Row(ids, [-100] * start + ids[start:], teacher_ids, places)


def groups_by_hand(row, student, teacher):
    """(tokens of the student, tokens of the teacher) that cover the same text, or are the same marker, as indices."""
    sides = [student.read(row.student_ids), teacher.read(row.teacher_ids)]
    gaps = [[0, 0]]
    for *starts, length in row.places:
        ends = [
            {i: min(b - start, length) for i, (_, a, b) in enumerate(side) if a < start + length and start < b}
            for side, start in zip(sides, starts, strict=True)
        ]
        common = [0, *sorted({*ends[0].values()} & {*ends[1].values()})]
        for low, high in itertools.pairwise(common):
            group = [[i for i, end in side.items() if low < end <= high] for side in ends]
            texts = {"".join(side[i][0] for i in part) for side, part in zip(sides, group, strict=True)}
            if len(texts) == 1:
                yield group
        gaps[-1] += starts
        gaps.append([start + length for start in starts])
    gaps[-1] += [10**9, 10**9]
    for first, teacher_first, last, teacher_last in gaps:
        mine, theirs = (
            [i for i, (token, begin, _) in enumerate(side) if isinstance(token, Marker) and low <= begin <= high]
            for side, low, high in zip(sides, (first, teacher_first), (last, teacher_last), strict=True)
        )
        for i in mine:
            same = [j for j in theirs if sides[1][j][0] == sides[0][i][0]]
            if same:
                yield [[i], same[:1]]
                theirs = [j for j in theirs if j > same[0]]


def counted(row, groups):
    """Those of which every token bears a label and is predicted by another."""
    for mine, theirs in groups:
        if min(mine + theirs) > 0 and all(row.labels[i] != -100 for i in mine):
            yield mine, theirs


# ----------------------------------------------------------------------------------------------------- the loss by hand


class Names:
    """What two vocabularies can both say: the name of each token, None for one without, False for what is left out."""

    def __init__(self, student, teacher):
        def key(token):
            return (type(token), str(token))

        sides = [[key(token) for token in side.tokens] for side in (student, teacher)]
        self.shared = sorted({*sides[0]} & {*sides[1]}, key=str)
        index = {token: k for k, token in enumerate(self.shared)}
        self.names = []
        for side in sides:
            found = []
            for kind, token in side:
                if kind is Marker:
                    found.append(index.get((kind, token), False))
                else:
                    beginnings = [index.get((kind, token[:n])) for n in range(1, len(token) + 1)]
                    found.append(next((k for k in reversed(beginnings) if k is not None), None))
            self.names.append(found)
        self.own = [[index.get(token) for token in side] for side in sides]
        self.inside = [torch.tensor([name is not False for name in side]) for side in self.names]
        self.unnamed = [[v for v, name in enumerate(side) if name is None] for side in self.names]
        self.counting = [
            torch.tensor([[name is not None and name is not False and name == k for k in range(len(index))]
                          for name in side]).double()
            for side in self.names
        ]  # fmt: skip

    def log_probs(self, k, logits, temperature):
        """Of the tokens of the student (k = 0) or the teacher (1) that both sides may say."""
        logits = logits[:, : len(self.names[k])] / temperature
        return logits.masked_fill(~self.inside[k], -torch.inf).log_softmax(-1)

    def outcomes(self, k, probs, first, text_prob, text):
        """(K + 1,) the names and, last, the text if it is none; what is unnamed."""
        name = self.names[k][first]
        numbers = torch.arange(len(self.shared) + 1)
        masses = F.pad(probs @ self.counting[k], (0, 1)) + text_prob * (numbers == text)
        unnamed = probs[self.unnamed[k]]
        if name is None:
            unnamed = unnamed - text_prob * (torch.tensor(self.unnamed[k]) == first)
        else:
            masses = masses - text_prob * (numbers == name)
        assert (masses.sum() + unnamed.sum()).item() == pytest.approx(1)
        return masses, unnamed


def sorted_distance(student, teacher):
    width = max(len(student), len(teacher))
    first, second = (F.pad(x.sort(descending=True).values, (0, width - len(x))) for x in (student, teacher))
    return (first - second).abs().sum()


def group_terms(names, group, ids, log_probs, method, divergence):
    """The divergence of a group, the distance of what is sorted, whether both would begin alike."""
    firsts = [side[i[0] - 1] for side, i in zip(log_probs, group, strict=True)]  # (V,) of each side
    best = [side[log_prob.argmax()] for side, log_prob in zip(names.own, firsts, strict=True)]
    agree = best[0] == best[1] and best[0] is not None and len(group[0]) == len(group[1]) == 1
    if method == "uld":
        return 0.0, sorted_distance(*(x.exp() for x in firsts)), agree
    text, parts = len(names.shared), []
    for k in (0, 1):
        own = names.own[k][ids[k][group[k][0]]]
        if len(group[k]) == 1 and own is not None:
            text = own
    for k in (0, 1):
        log_text = sum(log_probs[k][i - 1, ids[k][i]] for i in group[k])
        parts.append(names.outcomes(k, firsts[k].exp(), ids[k][group[k][0]], log_text.exp(), text))
    (mine, my_rest), (theirs, their_rest) = parts
    live = torch.arange(len(mine)) < len(mine) - (text < len(names.shared))
    mine, theirs = mine[live], theirs[live]
    distance = 0.0
    if len(my_rest) and len(their_rest):
        distance = sorted_distance(my_rest, their_rest)
        mine, theirs = torch.cat([mine, my_rest.sum()[None]]), torch.cat([theirs, their_rest.sum()[None]])
    return ORACLE[divergence](theirs / theirs.sum(), mine / mine.sum()), distance, agree


def by_hand(
    model, student, teachers, rows, *, kd_weight=0.7, temperature=2.0, method="aligned", divergence="forward_kl"
):
    """What is logged of an update, and its gradients.

    Args:
        teachers: (model, [`Side`], weight) for each; the student's own side for one with its vocabulary.
        rows: for each teacher the rows as both read them.
    """
    model = copy.deepcopy(model).double()
    sums = dict.fromkeys(("loss", "kd", "ce", "agreement", "paired", "exact", "items"), 0.0)
    size = len(student.tokens)
    for (teacher, side, weight), its_rows in zip(teachers, rows, strict=True):
        teacher = copy.deepcopy(teacher).double()
        names = Names(student, side)
        for row in its_rows:
            logits = model(input_ids=torch.tensor([row.student_ids])).logits[0, :, :size]  # (T, V)
            labels = torch.tensor(row.labels[1:])
            ce = F.cross_entropy(logits[:-1], labels, reduction="sum")
            kd = kd_loss = agreement = 0.0
            with torch.no_grad():
                theirs = teacher(input_ids=torch.tensor([row.teacher_ids])).logits[0, :, : len(side.tokens)]  # (Tt, V)
            if side is student:
                bears = labels != -100
                sums["paired"] += weight * bears.sum().item()
                mine, theirs = logits[:-1][bears], theirs[:-1][bears]
                agreement = (mine.argmax(-1) == theirs.argmax(-1)).sum().item()
                kd = ORACLE[divergence]((theirs / temperature).softmax(-1), (mine / temperature).softmax(-1)).sum()
                kd_loss = temperature**2 * kd
            else:
                log_probs = [names.log_probs(k, x, temperature) for k, x in enumerate((logits, theirs))]
                for group in counted(row, groups_by_hand(row, student, side)):
                    ids = row.student_ids, row.teacher_ids
                    value, distance, agree = group_terms(names, group, ids, log_probs, method, divergence)
                    kd = kd + value + distance
                    kd_loss = kd_loss + temperature**2 * value + temperature * distance
                    agreement += agree
                    sums["exact"] += len(group[0]) == len(group[1]) == 1
                    sums["paired"] += weight * (len(group[0]) == len(group[1]) == 1)
            sums["loss"] = sums["loss"] + weight * (kd_weight * kd_loss + (1 - kd_weight) * ce)
            for name, value in {"kd": kd, "ce": ce, "agreement": agreement, "items": (labels != -100).sum()}.items():
                sums[name] += weight * torch.as_tensor(value).item()
    loss = sums["loss"] / sums["items"]
    gradients = {name: gradient.float() for name, gradient in dense_gradients(loss, model).items()}
    means = {name: torch.as_tensor(value).item() / sums["items"] for name, value in sums.items()}
    return means | {"agreement": sums["agreement"] / sums["paired"]}, gradients


def assert_is(log, expected, prefix=""):
    for name in NAMES:
        assert log[prefix + name] == pytest.approx(expected[name], rel=1e-5), name


# -------------------------------------------------------------------------------------- another tokenizer: the updates


@pytest.fixture(scope="module")
def meta_teacher():
    return make_model("gemma2", vocab_size=256, seed=3)


def rows_by_hand(dataset, student, teacher, **options):
    return [row_by_hand(row, student, teacher, **options) for row in dataset]


def test_groups_have_every_shape_and_labels_begin_inside_of_some(byte_side, meta_side):
    """One to one, one to many, many to one, many to many; bytes and markers; one side with a space more."""
    shapes, parted = set(), 0
    for name, dataset in DATASETS.items():
        for row in rows_by_hand(dataset, byte_side, meta_side):
            groups = list(groups_by_hand(row, byte_side, meta_side))
            shapes |= {(min(len(mine), 2), min(len(theirs), 2)) for mine, theirs in groups}
            bears = [{row.labels[i] != -100 for i in mine} for mine, _ in groups]
            parted += name == "completion" and {True, False} in bears
            ends = [byte_side.tokens[row.student_ids[i]] for mine, _ in groups for i in mine]
            assert "eos" in ends
    assert shapes == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert parted >= 2


CASES = {
    "text": ("text", {}, SPLITS[::2]),
    "cut text": ("text", {"max_length": 12}, SPLITS[:1]),
    "completion": ("completion", {}, SPLITS[::2]),
    "completion by rank": ("completion", {"cross_tokenizer": "uld"}, SPLITS[2:]),
    "messages": ("messages", {"divergence": "jensen_shannon"}, SPLITS[::2]),
    "answer": ("answer", {}, SPLITS[::2]),
    "answer by rank": ("answer", {"cross_tokenizer": "uld"}, SPLITS[1:2]),
}


@pytest.mark.parametrize("case", CASES)
def test_another_tokenizer_gives_the_update_by_hand(tmp_path, byte_side, meta_side, student, meta_teacher, case):
    name, options, splits = CASES[case]
    rows = rows_by_hand(DATASETS[name], byte_side, meta_side, max_length=options.get("max_length"))
    method = options.get("cross_tokenizer", "aligned")
    formula = {"method": method, "divergence": options.get("divergence", "forward_kl")}
    expected, gradients = by_hand(student, byte_side, [(meta_teacher, meta_side, 1.0)], [rows], **formula)
    tokenizers = (byte_side.tokenizer, meta_side.tokenizer)
    for split in splits:
        trainer, found = make_trainer(tmp_path, student, meta_teacher, tokenizers, DATASETS[name], split, **options)
        assert trainer.teacher.method == method
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["alignment/exact_fraction"] == pytest.approx(expected["exact"], rel=1e-5)
        assert_is(log, expected)
        assert_same_gradients(found.first, gradients)


@pytest.mark.parametrize("name", DATASETS)
def test_sides_may_change(tmp_path, byte_side, meta_side, name):
    """The student's texts have a beginning, and its template takes white space away."""
    student = make_model("llama", vocab_size=250, seed=2)
    teacher = make_model("gpt2", vocab_size=VOCAB + 8, seed=4)
    rows = rows_by_hand(DATASETS[name], meta_side, byte_side)
    expected, gradients = by_hand(student, meta_side, [(teacher, byte_side, 1.0)], [rows])
    tokenizers = (meta_side.tokenizer, byte_side.tokenizer)
    trainer, found = make_trainer(tmp_path, student, teacher, tokenizers, DATASETS[name], (2, 4), DATASETS[name])
    for metrics in evaluations(trainer, [1, 3, 8] if name == "answer" else [3]):
        assert_is(metrics, expected, "eval_")
        assert metrics["eval_alignment/exact_fraction"] == pytest.approx(expected["exact"], rel=1e-5)
    trainer.train()
    assert_is(trainer.state.log_history[-2], expected)
    assert_same_gradients(found.first, gradients)


@pytest.mark.parametrize("fine_is_student", [True, False])
def test_the_first_token_counts_only_where_both_predict_it(tmp_path, fine_is_student):
    """One side has a token before the text, the other none. The first group has several tokens of the finer side."""
    fine, coarse = make_tokenizer(280), make_tokenizer(440, corpus=[*SENTENCES, *SENTENCES[3:]])
    coarse.add_special_tokens({"bos_token": "<s>"})
    coarse.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", coarse.bos_token_id)]
    )
    sides = [Side(tokenizer, list(spelled(tokenizer)), "", {}) for tokenizer in (fine, coarse)]
    student_side, teacher_side = sides if fine_is_student else sides[::-1]
    student, teacher = make_model(seed=2, vocab_size=len(student_side.tokens)), make_model(seed=1, vocab_size=448)
    rows = rows_by_hand(DATASETS["text"], student_side, teacher_side)
    groups = [group for row in rows for group in groups_by_hand(row, student_side, teacher_side)]
    assert any(0 in group[1 - fine_is_student] and len(group[1 - fine_is_student]) > 1 for group in groups)
    expected, gradients = by_hand(student, student_side, [(teacher, teacher_side, 1.0)], [rows])
    tokenizers = (student_side.tokenizer, teacher_side.tokenizer)
    found, log = update(tmp_path, student, teacher, tokenizers, DATASETS["text"], (4, 2))
    assert log["alignment/exact_fraction"] == pytest.approx(expected["exact"], rel=1e-5)
    assert_is(log, expected)
    assert_same_gradients(found, gradients)


@pytest.mark.parametrize("name", ["completion", "answer"])
def test_labels_anywhere_in_rows_of_tokens_are_those_that_count(
    tmp_path, byte_side, meta_side, student, meta_teacher, name
):
    """Tokens and labels are given; groups of which a part bears no label are left out as a whole."""
    rows, dataset = rows_by_hand(DATASETS[name], byte_side, meta_side), []
    for i, (row, raw) in enumerate(zip(rows, DATASETS[name], strict=True)):
        labels = [label if (k + i) % 5 else -100 for k, label in enumerate(row.student_ids)]
        rows[i] = row._replace(labels=labels)
        more = {"messages": raw["prompt"] + raw["completion"]} if name == "answer" else {}
        dataset.append({"input_ids": row.student_ids, "labels": labels, **more})
    expected, gradients = by_hand(student, byte_side, [(meta_teacher, meta_side, 1.0)], [rows])
    tokenizers = (byte_side.tokenizer, meta_side.tokenizer)
    found, log = update(tmp_path, student, meta_teacher, tokenizers, Dataset.from_list(dataset), (4, 2))
    assert_is(log, expected)
    assert_same_gradients(found, gradients)


@pytest.mark.parametrize("name", ["completion", "messages"])
def test_sum_weighs_teachers_of_both_kinds(tmp_path, byte_side, meta_side, teacher, student, meta_teacher, name):
    sides, weights = (byte_side, meta_side), (0.3, 0.7)
    rows = [rows_by_hand(DATASETS[name], byte_side, side) for side in sides]
    teachers = [teacher, meta_teacher]
    parts = list(zip(teachers, sides, weights, strict=True))
    expected, gradients = by_hand(student, byte_side, parts, rows, divergence="reverse_kl")
    tokenizers = (byte_side.tokenizer, [side.tokenizer for side in sides])
    options = {"teacher_combination": "sum", "divergence": "reverse_kl", "teacher_weights": [3.0, 7.0]}
    for split in SPLITS[::2]:
        found, log = update(tmp_path, student, teachers, tokenizers, DATASETS[name], split, **options)
        assert_is(log, expected)
        assert log["alignment/exact_fraction"] == pytest.approx(expected["exact"], rel=1e-5)
        assert_same_gradients(found, gradients)


def test_a_teacher_and_its_twins_of_both_kinds_share_its_weight_in_a_sum(
    tmp_path, tokenizer, permuted_tokenizer, meta_side, teacher, permuted_teacher, student, meta_teacher
):
    teachers = {"plain": teacher, "foreign": meta_teacher, "permuted": permuted_teacher, "again": teacher}
    names = {"plain": tokenizer, "foreign": meta_side.tokenizer, "permuted": permuted_tokenizer, "again": tokenizer}
    results = []
    for weights in ({"plain": 3, "foreign": 7}, {"permuted": 1, "foreign": 7, "again": 1, "plain": 1}):
        chosen = [{name: x[name] for name in weights} for x in (teachers, names)]
        results.append(update(
            tmp_path, student, chosen[0], (tokenizer, chosen[1]), DATASETS["completion"], (4, 2),
            teacher_combination="sum", teacher_weights=list(weights.values()),
        ))  # fmt: skip
    (expected, expected_log), (found, log) = results
    assert log["loss"] == pytest.approx(expected_log["loss"], rel=1e-6)
    assert log["kd"] == pytest.approx(expected_log["kd"], rel=1e-6)
    mean = (1 + expected_log["alignment/exact_fraction"]) / 2  # over those with another tokenizer
    assert log["alignment/exact_fraction"] == pytest.approx(mean)
    assert_same_gradients(found, expected)


def test_unrelated_models_agree_at_chance_level_and_a_permuted_copy_always(
    tmp_path, tokenizer, teacher, permuted_teacher, permuted_tokenizer
):
    """A likeliest name that collects many tokens is no agreement."""
    other = make_tokenizer(300, corpus=[text[::-1] for text in SENTENCES])
    unrelated = make_model(seed=7, vocab_size=len(other))
    student = copy.deepcopy(teacher).requires_grad_(True)
    found = {}
    for name, model, its in (("unrelated", unrelated, other), ("copy", permuted_teacher, permuted_tokenizer)):
        trainer, _ = make_trainer(
            tmp_path, student, model, (tokenizer, its), DATASETS["text"], held_out=DATASETS["text"], kd_weight=1.0
        )
        found[name] = trainer.evaluate()["eval_agreement"]
    assert found["copy"] == 1
    assert found["unrelated"] < 0.1
