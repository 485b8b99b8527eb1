"""A store in the place of its teacher: the same updates, whatever rows are joined, shuffled, streamed or read by.

Shapes: N label-bearing positions, V vocabulary.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer
from hf_distill import SpeculativeKDConfig as SKDConfig
from hf_distill import SpeculativeKDTrainer as SKDTrainer
from hf_distill.losses.sparse import SparseSignal, TopKSignal
from hf_distill.store.documents import Documents
from hf_distill.store.formats import format_of
from hf_distill.teachers.across import AcrossTeacher
from hf_distill.teachers.stored import StoredTeacher, changes, open_store
from hf_distill.teachers.writing import Method
from tests.conftest import SENTENCES, make_model, make_tokenizer

SAMPLED, TOP = Method("sampled", entries=100), Method("topk", entries=20)


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_dict({"text": [f"{text} {text[i:]}" for i, text in enumerate(SENTENCES * 2)]})


@pytest.fixture(scope="module")
def held_out():
    return Dataset.from_dict({"text": [text[::-1] for text in SENTENCES[:3]]})


@pytest.fixture(scope="module")
def questions():
    rows = [{"prompt": text[:20], "completion": text[20:], "teacher_prompt": text[5:40]} for text in SENTENCES * 2]
    return Dataset.from_list(rows)


def make(folder, teacher, rows, tokenizer, trainer=KDTrainer, config=KDConfig, **changes):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1,
        "save_strategy": "no", "kd_weight": 0.8, **changes,
    }  # fmt: skip
    more = {name: settings.pop(name, None) for name in ("peft_config", "eval_dataset", "teacher_processing_class")}
    student = settings.pop("student", None) or make_model(seed=2)
    return trainer(student, teacher, config(**settings), rows, processing_class=tokenizer, **more)


def teacher():
    return make_model("qwen2", seed=3)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, rows, held_out, tokenizer):
    """One store of each kind, of the teacher's rows and held-out rows."""
    folder = tmp_path_factory.mktemp("stores")
    writer = make(folder / "run", teacher(), rows, tokenizer, eval_dataset=held_out)
    kinds = {"float16": Method(), "int8": Method(dtype="int8"), "sampled": SAMPLED, "topk": TOP}
    for name, method in kinds.items():
        writer.write_cache(folder / name, method)
    return folder


def losses(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same(one, other, tolerance=1e-3):
    """Two trainers have made the same updates."""
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


WAYS = {
    "twenty updates": {"max_steps": 20},
    "shuffled otherwise": {"seed": 5},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "packed": {"packing": True, "max_length": 64, "per_device_train_batch_size": 2},
    "split and packed": {"packing": True, "packing_strategy": "bfd_split", "max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
    "tempered": {"temperature": 2.0, "divergence": "reverse_kl"},
    "scheduled": {"schedule": {"temperature": [3, 1], "kd_weight": [1, 0.2]}, "divergence": "jensen_shannon"},
    "adapters": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
    "cut": {"max_length": 16},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_store_of_hidden_states_makes_the_updates_of_its_teacher(tmp_path, stores, rows, held_out, tokenizer, way):
    options = {**WAYS[way], "eval_dataset": held_out}
    cuts = {name: options[name] for name in ("max_length", "packing_strategy", "packing") if name in options}
    store = stores / "float16"
    if "packing_strategy" in cuts or (cuts.get("max_length") or 64) < 64:  # other documents
        store = tmp_path / "store"
        make(tmp_path / "writer", teacher(), rows, tokenizer, **cuts, eval_dataset=held_out).write_cache(store)
    online = make(tmp_path / "online", teacher(), rows, tokenizer, **options)
    stored = make(tmp_path / "stored", f"cache:{store}", rows, tokenizer, **options)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-4)
    assert_same(stored, online)
    mine, theirs = stored.evaluate(), online.evaluate()
    for name in ("eval_kd", "eval_ce", "eval_loss", "eval_agreement", "eval_student_entropy"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3)


def test_int8_is_near(tmp_path, stores, rows, tokenizer):
    online, stored = (
        make(tmp_path / name, source, rows, tokenizer)
        for name, source in (("online", teacher()), ("stored", str(stores / "int8")))
    )
    assert losses(stored) == pytest.approx(losses(online), rel=5e-3)
    assert_same(stored, online, 5e-3)


def test_a_path_with_a_manifest_is_a_store_too(stores, rows, tokenizer, tmp_path):
    trainer = make(tmp_path, str(stores / "float16"), rows, tokenizer)
    assert isinstance(trainer.teacher, StoredTeacher)
    assert trainer.teacher.name == "Qwen2ForCausalLM"
    assert "float16" in trainer.describe_run()["teacher Qwen2ForCausalLM"]


@pytest.mark.parametrize(("name", "kind"), [("sampled", SparseSignal), ("topk", TopKSignal)])
def test_what_is_read_is_what_the_teacher_says(tmp_path, stores, rows, tokenizer, name, kind):
    trainer = make(tmp_path, f"cache:{stores / name}", rows, tokenizer)
    batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 4))
    inputs, positions, _ = trainer.take_labels(batch)
    signal = trainer.teacher_signal(dict(inputs), positions)
    assert isinstance(signal, kind)
    with torch.no_grad():
        logits = teacher()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    log_probs = logits.flatten(0, 1)[positions].double().log_softmax(-1)  # (N, V)
    if name == "topk":
        kept, ids = log_probs.topk(20)
        assert (signal.ids == ids).double().mean() > 0.99  # ties in the last bits
        assert torch.allclose(signal.log_probs.double(), kept, atol=5e-3)
        tail = (1 - kept.exp().sum(-1)).log()
        assert torch.allclose(signal.log_tail.double(), tail, atol=5e-3)
        return
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    assert torch.allclose(signal.entropy.double(), entropy, atol=5e-3)
    assert torch.allclose(signal.weights.sum(-1), torch.ones(len(positions)), atol=1e-5)
    probs = log_probs.exp().gather(-1, signal.ids.long())
    exact = torch.arange(signal.ids.shape[1]) < signal.num_exact.unsqueeze(-1)
    assert exact.any()
    # Of the largest, what the others lack by rounding is a part.
    assert torch.allclose(signal.weights.double()[exact], probs[exact], rtol=1e-3, atol=5e-4)


def test_samples_are_unbiased_over_seeds(tmp_path, rows, tokenizer):
    writer = make(tmp_path / "run", teacher(), rows.select(range(4)), tokenizer)
    batch = writer.batch_collator()(writer.first_rows(writer.train_dataset, 4))
    inputs, positions, _ = writer.take_labels(batch)
    signal = writer.teacher_signal(dict(inputs), positions)
    truth = signal.head.logits(signal.hidden).softmax(-1)  # (N, V)
    documents = Documents.of_rows(writer.first_rows(writer.train_dataset, 4))
    keys, draws = [*map(bytes, documents.keys())], 60
    for sampler in ("threshold", "multinomial"):
        manifest = writer.write_cache(tmp_path / sampler, Method("sampled", sampler=sampler, entries=20))
        total, squared = torch.zeros_like(truth), torch.zeros_like(truth)
        for seed in range(draws):
            format = format_of(replace(manifest, seed=seed))
            read = format.collate(format.encode(signal, keys, documents.num_labels.tolist()))
            drawn = torch.zeros_like(truth).scatter_add_(-1, read["ids"].long(), read["weights"])
            total, squared = total + drawn, squared + drawn.square()
        mean = total / draws
        error = ((squared / draws - mean.square()).clamp(min=0) / draws).sum().sqrt()  # of the mean, if it is unbiased
        assert (mean - truth).norm() < 1.2 * error
        assert (mean - truth).norm() > 0.8 * error


def test_a_stream_is_read_as_it_comes(tmp_path, stores, rows, tokenizer):
    online = make(tmp_path / "online", teacher(), rows.to_iterable_dataset(), tokenizer)
    stored = make(tmp_path / "stored", f"cache:{stores / 'float16'}", rows.to_iterable_dataset(), tokenizer)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-4)
    assert_same(stored, online)
    assert stored.accelerator.dataloader_config.dispatch_batches is False
    other = Dataset.from_dict({"text": [*rows["text"][:4], "nobody has written this"] * 3}).to_iterable_dataset()
    trainer = make(tmp_path / "other", f"cache:{stores / 'float16'}", other, tokenizer)
    with pytest.raises(ValueError, match=r"1 of 4 texts of a batch are not in the store.* these texts are new"):
        trainer.train()


def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path, stores, rows, tokenizer):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path, f"cache:{stores / 'sampled'}", rows, tokenizer, **options)
    whole.train()
    resumed = make(tmp_path, f"cache:{stores / 'sampled'}", rows, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ several teachers


@pytest.mark.parametrize("combination", ["mixture", "sum"])
def test_a_store_is_one_of_several_teachers(tmp_path, stores, rows, tokenizer, combination):
    second = make_model(seed=9)
    options = {"teacher_combination": combination, "teacher_weights": [0.3, 0.7], "divergence": "reverse_kl"}
    online = make(tmp_path / "online", [teacher(), second], rows, tokenizer, **options)
    stored = make(tmp_path / "stored", [f"cache:{stores / 'float16'}", second], rows, tokenizer, **options)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-4)
    assert_same(stored, online)


def test_two_stores_are_two_teachers(tmp_path, stores, rows, tokenizer):
    make(tmp_path / "writer", make_model(seed=9), rows, tokenizer).write_cache(tmp_path / "second")
    online = make(tmp_path / "online", [teacher(), make_model(seed=9)], rows, tokenizer)
    names = {"one": f"cache:{stores / 'float16'}", "other": str(tmp_path / "second")}
    stored = make(tmp_path / "stored", names, rows, tokenizer)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-4)
    assert list(stored.teachers) == ["one", "other"]


def test_a_mixture_with_a_sample_has_the_gradient_of_the_mixture(tmp_path, stores, rows, tokenizer):
    second = make_model(seed=9)
    mixed = make(tmp_path / "mixed", [f"cache:{stores / 'sampled'}", second], rows, tokenizer, kd_weight=1.0)
    alone = [make(tmp_path / "a", t, rows, tokenizer, kd_weight=1.0) for t in (f"cache:{stores / 'sampled'}", second)]
    gradients = []
    for trainer in (mixed, *alone):
        batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 4))
        loss = trainer.compute_loss(trainer.model, batch)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.model.parameters()))]))
    assert torch.allclose(gradients[0], (gradients[1] + gradients[2]) / 2, atol=1e-6)


# -------------------------------------------------------------------------------------- texts of the teacher's own


def test_another_prompt_of_the_teacher_is_part_of_the_document(tmp_path, questions, tokenizer):
    make(tmp_path / "writer", teacher(), questions, tokenizer).write_cache(tmp_path / "store")
    online = make(tmp_path / "online", teacher(), questions, tokenizer)
    stored = make(tmp_path / "stored", f"cache:{tmp_path / 'store'}", questions, tokenizer)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-4)
    assert_same(stored, online)
    plain = questions.remove_columns("teacher_prompt")
    with pytest.raises(ValueError, match="16 of 16 texts of the train dataset are not in the store"):
        make(tmp_path / "other", f"cache:{tmp_path / 'store'}", plain, tokenizer)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_a_store_of_a_teacher_with_another_tokenizer(tmp_path, rows, tokenizer, method):
    other = make_tokenizer(330, corpus=[text.upper() for text in SENTENCES] + SENTENCES[:3])
    options = {"teacher_processing_class": other, "cross_tokenizer": method}
    make(tmp_path / "writer", make_model(seed=4, vocab_size=len(other)), rows, tokenizer, **options).write_cache(
        tmp_path / "store"
    )
    online = make(tmp_path / "online", make_model(seed=4, vocab_size=len(other)), rows, tokenizer, **options)
    stored = make(tmp_path / "stored", f"cache:{tmp_path / 'store'}", rows, tokenizer, cross_tokenizer=method)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-4)
    assert_same(stored, online)
    with pytest.raises(ValueError, match="different vocabularies"):
        make(tmp_path / "no", f"cache:{tmp_path / 'store'}", rows, tokenizer, cross_tokenizer="error")


# -------------------------------------------------------------------------------------------------- what is refused


REFUSED = {
    "reverse KL of a sample": ("sampled", {"divergence": "reverse_kl"}, "unbiased for forward_kl only"),
    "temperature of a sample": ("sampled", {"temperature": 2.0}, "temperature=2 cannot be had .* taken at 1"),
    "temperature of top-k": ("topk", {"temperature": 0.5}, "temperature=0.5 cannot be had"),
    "a schedule of temperatures": ("sampled", {"schedule": {"temperature": [1, 3]}}, "temperature=3 cannot be had"),
    "quantisation": ("float16", {"teacher_quantization": "4bit"}, "teacher_quantization=None, and this run .* '4bit'"),
    "dtype": ("float16", {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "a teacher in float32, and this run"),
    "wrapped": ("float16", {"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cuts texts"),
    "hidden layers": ("float16", {"hidden_weight": 1.0}, "hidden_weight needs .* a model in this process"),
    "max_length": ("float16", {"max_length": 16}, "are not in the store .*max_length was 1024 and is 16"),
    "dispatched batches": ("float16", {"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cuts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_a_store_cannot_serve(tmp_path, stores, rows, tokenizer, case):
    name, settings, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        make(tmp_path, f"cache:{stores / name}", rows, tokenizer, **settings)


def test_trainers_that_need_a_model_say_so(tmp_path, stores, rows, questions, tokenizer):
    store = f"cache:{stores / 'float16'}"
    with pytest.raises(ValueError, match=r"KVProjectionTrainer needs .* a model in this process"):
        make(tmp_path, store, rows, tokenizer, KVProjectionTrainer, KVProjectionConfig)
    with pytest.raises(ValueError, match=r"SpeculativeKDTrainer needs .* a model in this process"):
        make(tmp_path, store, questions, tokenizer, SKDTrainer, SKDConfig, max_length=None, kd_weight=1.0)


def test_combinations_that_a_store_cannot_serve(tmp_path, stores, rows, tokenizer):
    second, routed = make_model(seed=9), rows.add_column("teacher", ["a"] * 8 + ["b"] * 8)
    for names, options in (
        ({"a": f"cache:{stores / 'sampled'}", "b": second}, {"divergence": "reverse_kl"}),
        ({"a": f"cache:{stores / 'topk'}", "b": second}, {}),
        ({"a": f"cache:{stores / 'float16'}", "b": second}, {"teacher_combination": "route"}),
    ):
        with pytest.raises(ValueError, match="a is no model, and teacher_combination="):
            make(tmp_path, names, routed, tokenizer, **options)


def test_another_tokenizer_of_the_same_size(tmp_path, stores, rows):
    other = make_tokenizer(384, corpus=[text.upper() for text in SENTENCES])
    with pytest.raises(ValueError, match="different vocabularies"):
        make(tmp_path, f"cache:{stores / 'sampled'}", rows, other)
    # Hidden states serve it: the teacher reads the text in its own tokens.
    stored = make(tmp_path / "stored", f"cache:{stores / 'float16'}", rows, other)
    assert isinstance(stored.teacher, AcrossTeacher)
    mine = make_tokenizer()
    online = make(tmp_path / "online", teacher(), rows, other, teacher_processing_class=mine)
    assert losses(stored) == pytest.approx(losses(online), rel=1e-4)


def test_another_chat_template_and_other_labels_are_named(tmp_path, messages_dataset, tokenizer):
    store = tmp_path / "store"
    make(tmp_path / "writer", teacher(), messages_dataset, tokenizer).write_cache(store)
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("<eos>", "\n")
    with pytest.raises(ValueError, match=r"are not in the store .*chat template was"):
        make(tmp_path / "run", str(store), messages_dataset, other)
    with pytest.raises(ValueError, match=r"are not in the store .*assistant_only_loss was False and is True"):
        make(tmp_path / "run", str(store), messages_dataset, tokenizer, assistant_only_loss=True)


def test_only_what_no_writing_had_is_blamed(tmp_path, rows, tokenizer):
    """A second writing has added rows with other settings. What is missing then is missing in both."""
    store = tmp_path / "store"
    for length in (16, 24):
        manifest = make(tmp_path / "writer", teacher(), rows, tokenizer, max_length=length).write_cache(store)
    assert [settings["max_length"] for settings in manifest.rows] == [16, 24]
    for length in (16, 24):
        make(tmp_path / "run", str(store), rows, tokenizer, max_length=length)
    with pytest.raises(ValueError, match=r"depend on: max_length was 16 or 24 and is 20\. Take the old ones"):
        make(tmp_path / "run", str(store), rows, tokenizer, max_length=20)
    more = Dataset.from_dict({"text": [*rows["text"], "nobody has written this"]})
    with pytest.raises(ValueError, match=r"1 of 17 .* row 16\. Settings are those of its writing, so these"):
        make(tmp_path / "run", str(store), more, tokenizer, max_length=24)


@pytest.mark.parametrize(
    ("writings", "now", "expected"),
    [
        ([{"a": 1, "b": 2}], {"a": 1, "b": 2}, []),
        ([{"a": 1, "b": 2}], {"a": 3, "b": 2}, ["a was 1 and is 3"]),
        ([{"a": 1, "b": 2}, {"a": 3, "b": 2}], {"a": 3, "b": 2}, []),
        ([{"a": 1, "b": 2}, {"a": 3, "b": 4}], {"a": 5, "b": 4}, ["a was 1 or 3 and is 5"]),
        ([{"a": 1, "b": 2, "c": 0}, {"a": 3, "b": 4, "c": 9}], {"a": 3, "b": 2, "c": 0}, ["a was 1 and is 3"]),
        ([{"b": 2}], {"a": 1, "b": 2}, []),  # of an older format
        ([], {"a": 1}, []),
    ],
)
def test_changes_are_those_from_the_nearest_writing(writings, now, expected):
    assert changes(writings, now) == expected


def test_the_same_template_from_elsewhere_is_the_same(tmp_path, messages_dataset, tokenizer):
    """A file of the settings, or a template that the tokenizer came with: what counts is its text."""
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("<eos>", "!")
    (tmp_path / "template.jinja").write_text(other.chat_template)
    store, options = tmp_path / "store", {"chat_template_path": str(tmp_path / "template.jinja")}
    make(tmp_path / "writer", teacher(), messages_dataset, make_tokenizer(), **options).write_cache(store)
    make(tmp_path / "run", str(store), messages_dataset, make_tokenizer(), **options)
    make(tmp_path / "run", str(store), messages_dataset, other)
    longer = messages_dataset.map(lambda row: {"messages": [*row["messages"], *row["messages"]]})
    with pytest.raises(ValueError, match="Settings are those of its writing, so these texts are new"):
        make(tmp_path / "run", str(store), longer, make_tokenizer(), **options)
    with pytest.raises(ValueError, match=r"depend on: chat template was '\w+' and is '\w+'\. Take the old ones"):
        make(tmp_path / "run", str(store), messages_dataset, make_tokenizer())


def test_another_end_of_text_is_named(tmp_path, stores, rows, tokenizer):
    with pytest.raises(ValueError, match=r"depend on: eos_token was '<eos>' and is '<\|user\|>'"):
        make(tmp_path, str(stores / "float16"), rows, make_tokenizer(), eos_token="<|user|>")


def test_a_smaller_vocabulary_than_that_of_the_probabilities(tmp_path, stores, rows, tokenizer):
    student = make_model(seed=2, vocab_size=380)
    with pytest.raises(ValueError, match="probabilities over 384 tokens, and this run has 380"):
        make(tmp_path, f"cache:{stores / 'sampled'}", rows, tokenizer, student=student)


def test_a_damaged_store_is_named(tmp_path, stores, rows, tokenizer):
    for name, damage, words in (
        (
            "head",
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            "head.safetensors is missing or damaged",
        ),
        ("data-0001-00000", lambda path: path.write_bytes(path.read_bytes()[:-9]), r"data-0001.* has [\d,]+ bytes of"),
        ("data-0001-00000", Path.unlink, "data-0001-00000.safetensors is missing: run"),
        ("index-0001-00000", lambda path: path.write_bytes(path.read_bytes()[:-9]), "index-0001.* is damaged: run"),
    ):
        folder = tmp_path / f"{name}{words[:3]}{len(words)}"
        shutil.copytree(stores / "float16", folder)
        damage(folder / f"{name}.safetensors")
        with pytest.raises(ValueError, match=words):
            make(tmp_path / "run", str(folder), rows, tokenizer)
    folder = tmp_path / "flipped"
    shutil.copytree(stores / "float16", folder)
    path = folder / "data-0001-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    trainer = make(tmp_path / "run", str(folder), rows, tokenizer)
    with pytest.raises(ValueError, match=r"data-0001-00000.safetensors is damaged near byte [\d,]+: run"):
        trainer.train()


def test_no_store(tmp_path, rows, tokenizer):
    with pytest.raises(ValueError, match=r"is no store of a teacher's outputs: it has no manifest.json"):
        make(tmp_path, f"cache:{tmp_path}", rows, tokenizer)


def test_rows_without_tokens_are_refused_before_training(tmp_path, stores, rows, tokenizer):
    for dataset in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="the train dataset has no column 'input_ids'"):
            make(
                tmp_path, f"cache:{stores / 'float16'}", dataset, tokenizer, remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            )  # fmt: skip


def test_a_store_without_its_tokenizer_says_so_and_gets_it_back(tmp_path, stores, rows, tokenizer):
    store = tmp_path / "store"
    shutil.copytree(stores / "float16", store)
    shutil.rmtree(store / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer is missing or damaged: run `hf-distill cache write`"):
        make(tmp_path, f"cache:{store}", rows, tokenizer)
    make(tmp_path, teacher(), rows, tokenizer).write_cache(store)
    assert make(tmp_path, f"cache:{store}", rows, tokenizer).teacher.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_batch_of_other_rows_is_noticed(tmp_path, stores, rows, tokenizer):
    trainer = make(tmp_path, f"cache:{stores / 'float16'}", rows, tokenizer)
    batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 4))
    batch["labels"][0, :5] = -100
    with pytest.raises(ValueError, match=r"a batch has \d+ label-bearing positions, and .* said something about \d+"):
        trainer.compute_loss(trainer.model, batch)


def test_rows_without_a_label_are_not_looked_up(stores):
    store = open_store(str(stores / "float16"), index=0, num_proc=None)
    assert len(Documents.of_rows([{"input_ids": [5, 6, 7], "labels": [-100] * 3}]).with_labels()) == 0
    found = store.collate([{"input_ids": [5, 6, 7], "labels": [-100] * 3}])
    assert found[f"{store.prefix}hidden"].shape == (0, 32)
    assert np.isfinite(found[f"{store.prefix}scale"].numpy()).all()
