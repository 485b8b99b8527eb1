"""Batches as the trainers read them: what the divisor counts, and padding that no model has an embedding for."""

import copy
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    BertGenerationDecoder,
    CTRLConfig,
    CTRLLMHeadModel,
)

from benchmarks.updates import RUNS
from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer
from hf_distill.evaluation import evaluate_fidelity, perplexity
from hf_distill.modeling import CachedReader, backbone, causal_lm, label_positions, last_hidden_states
from hf_distill.speculative import RolloutConfig, rollout
from hf_distill.teachers.kinds import own_models
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.trainers.test_kd import Gradients, assert_same_gradients, dense_gradients, dense_loss, settings
from tests.trainers.test_speculative_kd import make_trainer as make_speculative

VOCAB = 384
KV = {"kv_weight": 0.0, "projector": "pca"}


def make_trainer(folder, student, teacher, dataset, tokenizer, *, cls=KDTrainer, others=None, **changes):
    config = KVProjectionConfig if cls is KVProjectionTrainer else KDConfig
    return cls(
        student, teacher, config(**settings(folder, **changes)), train_dataset=dataset, processing_class=tokenizer,
        teacher_processing_class=tokenizer, **(others or {}),
    )  # fmt: skip


def first_update(folder, student, *args, **kwargs):
    capture = Gradients()
    callbacks = {"callbacks": [capture], **kwargs.pop("others", {})}
    trainer = make_trainer(folder, copy.deepcopy(student), *args, others=callbacks, **kwargs)
    trainer.train()
    return capture.first, trainer.state.log_history[0]


@pytest.fixture
def teacher():
    return make_model("llama", seed=1)


@pytest.fixture
def student():
    return make_model("llama", seed=2)


# ------------------------------------------------------------------------------------------------------ the divisor


def without_loss_type(family: str) -> nn.Module:
    """A model of a class whose name says no loss of transformers' own."""
    if family == "gpt2":
        return make_model("gpt2", seed=2)
    torch.manual_seed(2)
    if family == "ctrl":
        config = CTRLConfig(
            vocab_size=VOCAB, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0
        )
        return CTRLLMHeadModel(config)
    config = BertGenerationConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return BertGenerationDecoder(config)


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Rows of two tokens that both bear a label; nothing predicts the first one."""
    return Dataset.from_dict({"input_ids": [[20 + i, 90 + 3 * i] for i in range(8)]})


def with_labels(dataset: Dataset) -> Dataset:
    return dataset.add_column("labels", dataset["input_ids"][:])


@pytest.mark.parametrize("family", ["gpt2", "ctrl", "bert-generation"])
def test_first_tokens_are_not_counted_whatever_the_students_class(tmp_path, tokenizer, pairs, teacher, family):
    student = without_loss_type(family)
    loss = dense_loss(student, teacher, with_labels(pairs))
    expected = dense_gradients(loss, student)
    found, log = first_update(tmp_path, student, teacher, pairs, tokenizer)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, expected)


def test_divisor_is_the_same_for_accumulated_packed_and_padding_free_rows(tmp_path, tokenizer, pairs, teacher):
    student = without_loss_type("gpt2")
    loss = dense_loss(student, teacher, with_labels(pairs)).item()
    cuts = (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"packing": True, "max_length": 16},
        {"padding_free": True, "max_length": None},
    )
    for changes in cuts:
        _, log = first_update(tmp_path, student, teacher, pairs, tokenizer, **changes)
        assert log["loss"] == pytest.approx(loss, rel=1e-5), changes


def test_divisor_of_keys_and_values_counts_no_first_tokens(tmp_path, tokenizer, pairs):
    teacher, student = make_model("gpt2", seed=1), without_loss_type("gpt2")
    loss = dense_loss(student, teacher, with_labels(pairs)).item()
    _, log = first_update(tmp_path, student, teacher, pairs, tokenizer, cls=KVProjectionTrainer, **KV)
    assert log["loss"] == pytest.approx(loss, rel=1e-5)


def test_divisor_counts_what_label_positions_finds(tmp_path, tokenizer, pairs, teacher):
    trainer = make_trainer(tmp_path, without_loss_type("gpt2"), teacher, pairs, tokenizer)
    labels = [torch.tensor([[5, 6, -100, 7], [8, -100, -100, -100]]), torch.tensor([[-100, 9, 9]])]
    expected = sum(len(label_positions(batch)[0]) for batch in labels)
    found = trainer._get_num_items_in_batch([{"labels": batch} for batch in labels], torch.device("cpu"))
    assert expected == 4
    assert int(found) == expected


class WithShifted:
    """A collator of one's own that shifts the labels itself."""

    def __call__(self, rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        shifted = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "shift_labels": shifted}


class With:
    """A collator of one's own with something in its batches changed."""

    def __init__(self, **changes):
        self.changes = changes

    def __call__(self, rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        return {name: value for name, value in (batch | self.changes).items() if value is not None}


STRANGE_BATCHES = {
    "shifted labels": (WithShifted(), "'shift_labels'"),
    "no labels": (With(labels=None), "no 'labels'"),
    "flat labels": (With(labels=torch.zeros(8, dtype=torch.long)), r"labels of shape \(8,\)"),
    "longer labels": (With(labels=torch.zeros(8, 3, dtype=torch.long)), r"labels of shape \(8, 3\)"),
    "label -1": (With(labels=torch.full((8, 2), -1)), "label -1"),
    "label 9999": (With(labels=torch.full((8, 2), 9999)), "label 9999.*0 to 383"),
    "token 9999": (With(input_ids=torch.full((8, 2), 9999)), "token id 9999"),
    "token -3": (With(input_ids=torch.full((8, 2), -3)), "token id -3"),
}


@pytest.mark.parametrize("case", STRANGE_BATCHES)
def test_strange_batches_of_a_collator_of_ones_own_are_refused_in_words(
    tmp_path, tokenizer, pairs, student, teacher, case
):
    collator, message = STRANGE_BATCHES[case]
    trainer = make_trainer(tmp_path, student, teacher, pairs, tokenizer, others={"data_collator": collator})
    with pytest.raises(ValueError, match=message):
        trainer.train()


# ---------------------------------------------------------------------------------------- how often the host waits


class Waits(TorchDispatchMode):
    """Counts the moments at which the host needs a number from the device, in micro-batches but not in backbones."""

    NAMES = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}

    def __init__(self):
        super().__init__()
        self.is_on, self.backbones, self.count, self.micro_batches = False, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and isinstance(args[1], (list, tuple))
        by_mask = by_mask and any(each is not None and each.dtype == torch.bool for each in args[1])
        self.add(name in self.NAMES or by_mask)
        return func(*args, **(kwargs or {}))

    def add(self, number=1):
        self.count += number * (self.is_on and not self.backbones)

    def enter(self, *_):
        self.backbones += 1

    def leave(self, *_):
        self.backbones -= 1

    def watch(self, trainer, monkeypatch):
        for method in ("tolist", "cpu", "numpy"):  # on a CPU they are no operations
            called = getattr(torch.Tensor, method)
            monkeypatch.setattr(torch.Tensor, method, lambda *args, call=called: self.add() or call(*args))
        for model in [trainer.student, *(each.model for each in own_models(trainer.teachers).values())]:
            backbone(causal_lm(model)).register_forward_pre_hook(self.enter)
            backbone(causal_lm(model)).register_forward_hook(self.leave)
        step = trainer.training_step

        def counted(*args):
            self.is_on, self.micro_batches = True, self.micro_batches + 1
            try:
                return step(*args)
            finally:
                self.is_on = False

        monkeypatch.setattr(trainer, "training_step", counted)


WAITS = {
    "plain": 0, "completions": 0, "sum": 0, "taid with a schedule": 0, "hidden layers": 0, "adapters": 0,
    "keys and values, pca": 0, "speculative": 0,
    "route": 1 + 2,  # the rows of each teacher; each teacher's rows of a chunk
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_a_micro_batch_waits_for_the_device_in_its_models_alone(tmp_path, monkeypatch, name):
    trainer = RUNS[name](str(tmp_path))
    trainer.args.eval_strategy = "no"
    with Waits() as waits:
        waits.watch(trainer, monkeypatch)
        trainer.train()
    assert waits.micro_batches == 4
    assert waits.count == 4 * WAITS[name]


@pytest.mark.parametrize("name", ["plain", "sum", "hidden layers"])
def test_an_update_waits_once_before_its_micro_batches(tmp_path, monkeypatch, name):
    trainer = RUNS[name](str(tmp_path))
    trainer.args.eval_strategy = "no"
    look, found = trainer.label_counts.look_at, []
    with Waits() as waits:
        waits.watch(trainer, monkeypatch)

        def counted(batches):
            waits.is_on, before = True, waits.count
            look(batches)
            waits.is_on = False
            found.append((len(batches), waits.count - before))

        monkeypatch.setattr(trainer.label_counts, "look_at", counted)
        trainer.train()
    assert found == [(2, 1), (2, 1)]


def test_rollouts_are_counted_on_the_device_that_reads_them(tmp_path, monkeypatch):
    """They are written on the host, and what moves a tensor makes another one."""
    trainer = RUNS["speculative"](str(tmp_path))
    trainer.args.eval_strategy = "no"
    moved = {}

    def move(inputs):
        for name, tensor in inputs.items():
            if id(tensor) not in moved and isinstance(tensor, torch.Tensor):
                inputs = {**inputs, name: tensor.clone()}
                moved[id(inputs[name])] = inputs[name]
        return inputs

    monkeypatch.setattr(trainer, "_prepare_inputs", move)
    with mock.patch.object(trainer.label_counts, "_check", wraps=trainer.label_counts._check) as checks:
        trainer.train()
    assert moved
    assert not checks.call_count


@pytest.mark.parametrize("name", ["plain", "speculative"])
def test_batches_whose_writes_nobody_counts_are_checked(tmp_path, name):
    trainer = RUNS[name](str(tmp_path))
    expected = trainer.evaluate()["eval_loss"]
    with torch.inference_mode():
        assert trainer.evaluate()["eval_loss"] == expected
        labels = torch.tensor([[1, 2, 3]])
    trainer.label_counts.look_at([{"input_ids": labels, "labels": labels}])
    with mock.patch.object(trainer.label_counts, "_check", wraps=trainer.label_counts._check) as checks:
        assert trainer.label_counts({"input_ids": labels, "labels": labels}) == 2
    assert checks.call_count == 1


def changed_in_place(batch):
    batch["labels"][0, :3] = -100
    return batch


def changed_elsewhere(batch):
    labels = batch["labels"].clone()
    labels[0, :3] = -100
    return {**batch, "labels": labels}


def without_a_mask(batch):
    return {name: value for name, value in batch.items() if name != "attention_mask"}


@pytest.mark.parametrize("change", [changed_in_place, changed_elsewhere, without_a_mask, dict])
def test_labels_that_change_after_a_count_are_counted_again(tmp_path, student, teacher, rows, tokenizer, change):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer)
    batches = [trainer.collated([rows[i], rows[i + 1]]) for i in (0, 2)]
    trainer.label_counts.look_at(batches)
    with mock.patch.object(trainer.label_counts, "_check", wraps=trainer.label_counts._check) as checks:
        for number, batch in enumerate(map(change, batches), start=1):
            expected = label_positions(batch["labels"])
            _, *found = trainer.take_labels(batch)
            assert all(map(torch.equal, found, expected))
            assert checks.call_count == (0 if change is dict else number)


def test_a_faulty_batch_of_an_update_is_refused_where_it_is_used(tmp_path, student, teacher, rows, tokenizer):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer)
    good, bad, bare = (trainer.collated([rows[i]]) for i in range(3))
    bad["labels"][0, 2] = VOCAB + 5
    del bare["labels"]
    trainer.label_counts.look_at([good, bad, bare])
    assert len(trainer.take_labels(good)[1]) == (good["labels"][:, 1:] != -100).sum()
    with pytest.raises(ValueError, match=f"the label {VOCAB + 5}"):
        trainer.take_labels(bad)
    with pytest.raises(ValueError, match="no 'labels'"):
        trainer.take_labels(bare)


# ------------------------------------------------------------------------------- padding that has no embedding


@pytest.fixture(scope="module")
def padding_tokenizer():
    """The tokenizer with a pad token added at the end, id 384, for which no model has a row."""
    extended = make_tokenizer(added_tokens=("<mypad>",))
    extended.pad_token = "<mypad>"
    assert extended.pad_token_id == VOCAB
    return extended


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    """Eight ragged rows."""
    ids = [tokenizer(text)["input_ids"][: 6 + 3 * i] for i, text in enumerate(SENTENCES)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("cls", [KDTrainer, KVProjectionTrainer])
@pytest.mark.parametrize("changes", [{}, {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}])
def test_padding_without_an_embedding_gives_the_update_of_any_other_padding(
    tmp_path, tokenizer, padding_tokenizer, rows, student, teacher, cls, changes
):
    changes = {**changes, **({"projector": "pca"} if cls is KVProjectionTrainer else {})}
    expected, log = first_update(tmp_path, student, teacher, rows, tokenizer, cls=cls, **changes)
    found, again = first_update(tmp_path, student, teacher, rows, padding_tokenizer, cls=cls, **changes)
    assert again["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("more", [{"hidden_weight": 1.0, "hidden_layers": "cka"}, {"kv_layers": "cka"}])
def test_probes_read_padding_without_an_embedding(tmp_path, padding_tokenizer, rows, student, teacher, more):
    cls = KVProjectionTrainer if "kv_layers" in more else KDTrainer
    more = {**more, **({"projector": "pca"} if cls is KVProjectionTrainer else {})}
    make_trainer(tmp_path, student, teacher, rows, padding_tokenizer, cls=cls, **more).train()


def test_evaluation_and_prediction_read_padding_without_an_embedding(
    tmp_path, tokenizer, padding_tokenizer, rows, student, teacher
):
    found = []
    for chosen in (tokenizer, padding_tokenizer):
        trainer = make_trainer(
            tmp_path,
            copy.deepcopy(student),
            teacher,
            rows,
            chosen,
            others={"eval_dataset": rows},
            prediction_loss_only=False,
        )
        found.append((trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).predictions))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for row, (one, other) in zip(rows, zip(found[0][1], found[1][1], strict=True), strict=True):
        length = len(row["input_ids"])
        assert torch.allclose(torch.tensor(one[:length]), torch.tensor(other[:length]), atol=1e-5)


def test_student_with_padding_without_an_embedding_is_saved_so_that_it_loads(
    tmp_path, padding_tokenizer, rows, student, teacher
):
    trainer = make_trainer(tmp_path, student, teacher, rows, padding_tokenizer)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    loaded.generate(**batch, max_new_tokens=4, do_sample=False)


def test_rollouts_write_the_same_whatever_the_padding(tmp_path, tokenizer, padding_tokenizer, student, teacher):
    prompts = [" ".join(text.split()[: 2 + i % 3]) for i, text in enumerate(SENTENCES)]
    dataset = Dataset.from_dict({"prompt": prompts, "completion": [" Yes."] * 8})
    mix = {"rollout_mix": {"speculative": 0.5, "dataset": 0.5}}
    losses = []
    for chosen in (tokenizer, padding_tokenizer):
        trainer = make_speculative(
            tmp_path, copy.deepcopy(student), teacher, dataset, chosen, eval_dataset=dataset, **mix
        )
        trainer.train()
        losses.append((trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("pad", [-1, VOCAB, VOCAB + 5])
def test_models_read_padding_of_any_id(student, teacher, pad):
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = ids.masked_fill(mask == 0, pad)
    expected = last_hidden_states(student, input_ids=ids, attention_mask=mask)
    found = last_hidden_states(student, input_ids=padded, attention_mask=mask)
    assert torch.equal(found, expected)
    left, left_mask = ids.flip(1), mask.flip(1)
    reader = [CachedReader(student, x, left_mask).read() for x in (left, left.masked_fill(left_mask == 0, pad))]
    assert torch.equal(*reader)
    config = RolloutConfig(max_new_tokens=3, student_temperature=0, teacher_temperature=0)
    written = [
        rollout(student, teacher, x, left_mask, x, left_mask, config, eos_token_id=1, pad_token_id=pad)
        for x in (left, left.masked_fill(left_mask == 0, pad))
    ]
    assert torch.equal(written[0].completion_ids, written[1].completion_ids)


def test_collator_may_pad_with_minus_one(tmp_path, tokenizer, rows, student, teacher):
    def collate(batch, pad=-1):
        tensors = [torch.tensor(row["input_ids"]) for row in batch]
        pad_with = lambda value, x: nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=value)  # noqa: E731
        mask = pad_with(0, [torch.ones_like(row) for row in tensors])
        return {"input_ids": pad_with(pad, tensors), "labels": pad_with(-100, tensors), "attention_mask": mask}

    expected, _ = first_update(tmp_path, student, teacher, rows, tokenizer)
    found, _ = first_update(tmp_path, student, teacher, rows, tokenizer, others={"data_collator": collate})
    assert_same_gradients(found, expected)


def test_evaluation_functions_need_no_pad_token(student):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    rows = Dataset.from_dict({"text": SENTENCES})
    assert perplexity(student, rows, tokenizer)["perplexity"] > 1


# ------------------------------------------------------------------------------------------------- tables of positions


LONG = Dataset.from_dict({"input_ids": [[5, 6, 7] * 4, [5 + i for i in range(20)]]})


@pytest.mark.parametrize("cls", [KDTrainer, KVProjectionTrainer])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"dataset_kwargs": {"skip_prepare_dataset": True}}])
def test_rows_longer_than_a_table_of_positions_are_refused(tmp_path, tokenizer, cls, side, changes):
    models = {"student": make_model("llama", seed=2), "teacher": make_model("llama", seed=1)}
    models[side] = make_model("gpt2", seed=3, n_positions=16)

    def make(rows, held_out=None, **more):
        config = KDConfig if cls is KDTrainer else KVProjectionConfig
        args = config(**settings(tmp_path, **{"max_length": 64, **changes, **more}))
        return cls(*models.values(), args, rows, held_out, tokenizer)

    row = 0 if "packing" in changes else 1  # of the packed ones
    message = rf"the {side}.* has 16 positions, and row {row} of the prepared rows has 20 tokens: set max_length to"
    with pytest.raises(ValueError, match=message):
        make(LONG)
    with pytest.raises(ValueError, match=message):
        make(LONG.select([0]), {"a": LONG})
    if not changes:
        assert make(LONG, max_length=16)
    models[side] = make_model("llama", seed=3, max_position_embeddings=16)  # rotary positions go on
    assert make(LONG)


def test_measurements_of_rows_longer_than_a_table_of_positions_are_refused(tokenizer, teacher):
    student = make_model("gpt2", n_positions=16)
    with pytest.raises(ValueError, match="has 16 positions, and a text has 20 tokens: set max_length to at most 16"):
        evaluate_fidelity(student, teacher, LONG, tokenizer)
    assert evaluate_fidelity(student, teacher, LONG, tokenizer, max_length=16)["num_tokens"] == 11 + 15
