"""The checks of both models' predictions, and of what the trainer does with a batch."""

import math
import random
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_distill import KDTrainer, KVProjectionConfig, KVProjectionTrainer, SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.diagnosis import CHECKS, diagnose, updates
from hf_distill.diagnosis.findings import LeftOut
from hf_distill.diagnosis.forwards import compared
from hf_distill.diagnosis.probe import as_it_was, open_probe
from hf_distill.diagnosis.updates import gradient, training
from hf_distill.evaluation import evaluate_fidelity
from tests.conftest import SENTENCES, make_tokenizer
from tests.diagnosis.test_data_checks import CHATS
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub

PROMPTS = Dataset.from_dict({"prompt": [" ".join(text.split()[:4]) for text in SENTENCES]})


def changed(folder, tmp_path, change):
    """The folder of a changed copy of a teacher."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "changed")
    make_tokenizer().save_pretrained(tmp_path / "changed")
    return str(tmp_path / "changed")


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """The folder of a teacher that knows the sentences by heart."""
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").train()
    tokenizer = make_tokenizer()
    batch = tokenizer([text + "<eos>" for text in SENTENCES], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("learned")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_predictions_are_those_of_evaluate_fidelity(run, tokenizer):
    arguments = run(settings={"per_device_eval_batch_size": 3})
    with open_probe(KDTrainer, arguments, 16) as probe:
        (sums,) = compared(probe).values()
        rows, trainer = probe.rows, probe.trainer
        found = evaluate_fidelity(trainer.student, trainer.teacher.model, rows, tokenizer)
    assert sums.tokens == found["num_tokens"]
    assert math.exp(sums.student / sums.tokens) == pytest.approx(found["student_perplexity"], rel=1e-5)
    assert math.exp(sums.teacher / sums.tokens) == pytest.approx(found["teacher_perplexity"], rel=1e-5)
    assert sums.kl / sums.tokens == pytest.approx(found["kl"], rel=1e-5)
    assert sums.acceptance / sums.tokens == pytest.approx(found["expected_acceptance"], rel=1e-5)
    assert sums.agreement / sums.tokens == pytest.approx(found["agreement"])


def test_a_teacher_that_is_worse_than_a_guess_or_than_the_student_is_found(examine, learned, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.diagnosis.forwards.ENOUGH_LABELS", 100)
    assert examine("teacher's perplexity", teacher_model=learned).status == "ok"
    finding = examine("teacher's perplexity", model=learned)
    (numbers,) = finding.numbers.values()
    assert numbers["teacher"] > math.log(len(make_tokenizer()))
    assert finding.status == "failure"
    assert "a guess by the frequency" in finding.line
    # Where labels are few different ones, their frequencies say much that the teacher need not know.
    flat = changed(learned, tmp_path, lambda model: model.lm_head.weight.mul_(0.05))
    finding = examine("teacher's perplexity", model=learned, teacher_model=flat)
    (numbers,) = finding.numbers.values()
    assert numbers["guessed"] < numbers["teacher"] < math.log(len(make_tokenizer()))
    assert finding.status == "warning"
    monkeypatch.setattr("hf_distill.diagnosis.forwards.ENOUGH_LABELS", 10**6)
    assert examine("teacher's perplexity", model=learned).status == "warning"


def test_questions_that_bear_labels_are_the_first_reason_why_a_teacher_predicts_badly(examine, learned, monkeypatch):
    monkeypatch.setattr("hf_distill.diagnosis.forwards.ENOUGH_LABELS", 1)
    pairs = Dataset.from_list([{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHATS])
    for rows, settings, is_named in (
        (CHATS, {}, True), (CHATS, {"assistant_only_loss": True}, False), (pairs, {}, False)
    ):  # fmt: skip
        finding = examine("teacher's perplexity", model=learned, train_dataset=rows, settings=settings)
        assert "a guess by the frequency" in finding.line
        assert ("give the rows as prompt and completion" in finding.remedy) == is_named


def test_the_distance_at_the_start_is_0_between_a_model_and_its_copy(examine, folder, tokenizer, tmp_path):
    finding = examine("start", model=str(folder / "teacher"))
    assert finding.status == "warning"
    assert "one model" in finding.remedy
    assert examine("start").status == "ok"
    half = AutoModelForCausalLM.from_pretrained(str(folder / "teacher"), dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for settings in ({}, {"bf16": True}):  # a copy in another dtype is the same model
        found = examine("start", model=str(folder / "teacher"), teacher_model=str(tmp_path), settings=settings)
        assert found.status == "warning"
    lora = {"peft_config": LoraConfig(task_type="CAUSAL_LM"), "teacher_model": "base"}
    assert examine("start", **lora).status == "ok"  # the own base is meant
    (numbers,) = finding.numbers.values()
    assert numbers == pytest.approx({"kl": 0, "agreement": 1, "acceptance": 1}, abs=1e-5)


def test_a_teacher_that_never_ends_is_found(examine, learned, tmp_path):
    assert examine("teacher's EOS", teacher_model=learned).status == "ok"
    model = AutoModelForCausalLM.from_pretrained(learned)
    with torch.no_grad():
        model.lm_head.weight[1] *= -1
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert examine("teacher's EOS", teacher_model=str(tmp_path)).status == "warning"


def test_the_cost_of_four_bits_is_the_kl_to_the_saved_teacher(examine, folder, tmp_path):
    pytest.importorskip("bitsandbytes")

    def uneven(model):
        sizes = 10 ** (6 * torch.rand(48, generator=torch.Generator().manual_seed(0)) - 3)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(sizes.unsqueeze(1))
            layer.mlp.down_proj.weight.div_(sizes)

    settings = {"teacher_quantization": "4bit"}
    usual = examine("cost of bits", settings=settings)
    broken = examine("cost of bits", settings=settings, teacher_model=changed(folder / "teacher", tmp_path, uneven))
    assert 0 < usual.numbers["kl"] < 0.3 * broken.numbers["kl"]
    assert usual.numbers["saved"] == pytest.approx(broken.numbers["saved"], rel=1e-4)  # the same function
    with pytest.raises(LeftOut, match="no teacher is quantised"):
        examine("cost of bits")


def test_the_cost_of_bits_of_an_adapted_teacher_is_that_to_the_adapted_one(examine, folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    lora = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (whole,) = examine("teacher's perplexity", teacher_model=str(tmp_path)).numbers.values()
    (bare,) = examine("teacher's perplexity").numbers.values()
    for teachers in (str(tmp_path), {"adapted": str(tmp_path)}):
        settings = {"teacher_quantization": "4bit"}
        numbers = examine("cost of bits", teacher_model=teachers, settings=settings).numbers
        assert numbers["saved"] == pytest.approx(whole["teacher"], rel=1e-3)
        assert numbers["saved"] != pytest.approx(bare["teacher"], rel=1e-3)


class MixesRows(nn.Module):
    """A norm over the batch in the place of the last one."""

    def forward(self, hidden):
        return (hidden - hidden.mean((0, 1))) / hidden.std((0, 1))


def test_a_student_that_mixes_rows_is_found(examine, folder, tokenizer):
    assert examine("split batches").status == "ok"
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    student.model.norm = MixesRows()
    finding = examine("split batches", model=student, processing_class=tokenizer)
    assert finding.status == "failure"
    assert finding.numbers["difference"] > 0.1


def test_a_gradient_is_the_same_with_dropout_in_adapters(examine):
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    assert examine("split batches", peft_config=lora).numbers["difference"] < 1e-4


def test_packed_rows_are_told(examine):
    finding = examine("packing", settings={"packing": True, "max_length": 64})
    assert finding.numbers["texts"] == len(SENTENCES)
    assert finding.numbers["rows"] < len(SENTENCES)
    assert examine("split batches", settings={"packing": True, "max_length": 64}).status == "ok"


def test_a_misspelt_target_is_found(examine):
    assert examine("LoRA", peft_config=LoraConfig(r=2, target_modules=["q_proj"])).status == "ok"
    finding = examine("LoRA", peft_config=LoraConfig(r=2, target_modules=["qproj", "v_proj"]))
    assert finding.status == "warning"
    assert "'qproj' matches no module" in finding.line


@pytest.mark.parametrize(("rate", "status"), [(1e-3, "ok"), (3.0, "warning"), (1e-9, "warning")])
def test_a_learning_rate_that_harms_or_does_nothing_is_found(examine, rate, status):
    finding = examine("learning rate", settings={"learning_rate": rate, "lr_scheduler_type": "constant"})
    assert finding.status == status
    assert ("raise" if rate < 1e-3 else "lower" if rate > 1 else "") in finding.remedy


def test_nothing_of_the_callers_is_changed(run, folder, tokenizer, tmp_path):
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    teacher.train()
    models = (student, teacher)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    arguments = run(model=student, teacher_model=teacher, processing_class=tokenizer)
    settings = vars(arguments["args"]).copy()
    found = diagnose(KDTrainer, num_rows=4, **arguments)
    assert not [finding.line for finding in found.findings if "it stopped" in finding.line]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.training == (model is teacher)
    assert vars(arguments["args"]) == settings
    assert not (tmp_path / "out").exists()


def test_the_fall_of_the_loss_is_that_of_updates_at_the_full_rate(run):
    """Steps of gradient descent so small that the loss falls by the rate times the squared gradient in each."""
    rate, planned = 1e-3, 50
    settings = {
        "optim": "sgd", "learning_rate": rate, "max_steps": planned, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    with open_probe(KDTrainer, run(settings=settings), 8) as probe:
        finding = CHECKS["learning rate"](probe)
        with training(probe):
            slope = sum(g.square().sum().item() for g in gradient(probe, list(probe.batches(8, packed=True))))
    assert finding.numbers["fall"] == pytest.approx(rate * slope * planned / finding.numbers["before"], rel=0.05)


@pytest.mark.parametrize(
    ("memory", "use_cpu", "kind"), [(24 * 10**9, False, "cuda"), (24 * 10**9, True, "cpu"), (None, True, "cpu")]
)
def test_a_given_memory_is_that_of_a_gpu_unless_the_run_is_on_the_cpu(run, monkeypatch, memory, use_cpu, kind):
    machines = []

    def planned(*args, machine, **kwargs):
        machines.append(machine)
        return SimpleNamespace(peak=1, fits=True)

    monkeypatch.setattr("hf_distill.diagnosis.resources.plan_run", planned)
    monkeypatch.setattr("hf_distill.diagnosis.CHECKS", {"memory": CHECKS["memory"]})
    found = diagnose(KDTrainer, num_rows=4, memory=memory, **run(settings={"use_cpu": use_cpu}))
    assert found["memory"].status == "ok"
    (machine,) = machines
    assert machine.kind == kind
    assert memory in (None, machine.memory)
    assert (machine.reserve > 0) == (kind == "cuda")


@pytest.mark.parametrize(("share", "number"), [(0.01, 2), (0.5, 4), (5.0, 8)])
def test_a_cpu_reads_rows_at_even_distances_for_as_long_as_it_has_time(run, monkeypatch, share, number):
    with open_probe(KDTrainer, run(), 8) as probe:
        models = probe.trainer.model, probe.trainer.teacher.model
        work = sum(len(ids) for ids, _ in probe.texts) * sum(model.num_parameters() for model in models)
        monkeypatch.setattr("hf_distill.diagnosis.probe.MOST_WORK", share * work)
        monkeypatch.setattr("hf_distill.diagnosis.probe.LEAST_LABELS", 0)
        monkeypatch.setattr("hf_distill.diagnosis.probe.LEAST_ROWS", 2)
        lengths = [int(n) for batch in probe.batches(3) for n in batch["attention_mask"].sum(1)]
        assert lengths == sorted((len(ids) for ids, _ in probe.texts[:: 8 // number]), reverse=True)
        # However slow they are, so many label-bearing tokens are read.
        monkeypatch.setattr("hf_distill.diagnosis.probe.LEAST_LABELS", 10**6)
        assert sum(len(batch["input_ids"]) for batch in probe.batches(3)) == 8


def test_the_learning_rate_asks_the_teacher_about_each_batch_once_and_finds_the_same(run, monkeypatch):
    found = []
    for remembers in (True, False):
        if not remembers:
            names = CHECKS["learning rate"].__globals__
            monkeypatch.setitem(names, "asked_once", lambda probe: nullcontext())
        with open_probe(KDTrainer, run(), 8) as probe:
            trainer = probe.trainer
            with mock.patch.object(trainer, "teacher_signal", wraps=trainer.teacher_signal) as asked:
                found.append((CHECKS["learning rate"](probe).numbers, asked.call_count))
    (mine, few), (theirs, many) = found
    assert mine == theirs
    assert few == 2  # batches of 4 rows
    assert many > 3 * few


@pytest.mark.parametrize(("accumulation", "number"), [(1, 1), (2, 2)])
def test_checks_share_the_first_gradient_of_as_many_micro_batches(run, monkeypatch, accumulation, number):
    made = mock.Mock(wraps=updates._first_gradient)
    monkeypatch.setattr(updates, "_first_gradient", made)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    with open_probe(KDTrainer, run(settings=settings), 8) as probe:
        for name in ("split batches", "loss", "learning rate"):
            assert CHECKS[name](probe).status == "ok"
        assert probe.first is None
    assert made.call_count == number


@pytest.mark.parametrize(("seconds", "number", "distinct"), [(0.0, 2, 1), (1e6, 8, 2)])
def test_without_time_both_updates_are_made_on_the_same_rows(run, monkeypatch, seconds, number, distinct):
    names = CHECKS["learning rate"].__globals__
    read = []
    monkeypatch.setitem(names, "SECONDS", seconds)
    backward = names["backward"]
    monkeypatch.setitem(names, "backward", lambda probe, batches: read.append(batches) or backward(probe, batches))
    with open_probe(KDTrainer, run(settings={"per_device_train_batch_size": 4}), 8) as probe:
        finding = CHECKS["learning rate"](probe)
    assert finding.numbers["updates"] == number
    assert len(read) == 3 * (number - 1)  # the gradient of the first one is given
    assert len({id(batches[0]["input_ids"]) for batches in read}) == distinct
    assert len(set(finding.numbers["after"])) == 3


@pytest.mark.parametrize("rate", [0.0, 1e-12])
def test_a_rate_that_changes_no_weight_is_too_low(examine, rate):
    finding = examine("learning rate", settings={"learning_rate": rate, "max_steps": 5})
    assert finding.status == "warning"
    assert "raise learning_rate" in finding.remedy


def test_one_row_cannot_be_split(run):
    arguments = run()
    arguments["train_dataset"] = arguments["train_dataset"].select([0])
    found = diagnose(KDTrainer, num_rows=64, **arguments)
    assert found["split batches"].status == "left out"
    assert found.num_rows == 1


@pytest.mark.parametrize(("share", "rows"), [(0.01, 2), (100.0, 1)])
def test_a_cpu_without_time_for_packed_rows_reads_texts(run, monkeypatch, share, rows):
    arguments = run(settings={"packing": True, "max_length": 64, "padding_free": False})
    with open_probe(KDTrainer, arguments, 8) as probe:
        models = probe.trainer.model, probe.trainer.teacher.model
        work = sum(len(ids) for ids, _ in probe.texts) * sum(model.num_parameters() for model in models)
        monkeypatch.setattr("hf_distill.diagnosis.probe.MOST_WORK", share * work)
        monkeypatch.setattr("hf_distill.diagnosis.probe.LEAST_LABELS", 0)
        batch = next(updates.micro_batches(probe, 2))
        assert CHECKS["split batches"](probe).status == "ok"
    starts = (batch["position_ids"] == 0).sum() if "position_ids" in batch else len(batch["input_ids"])
    assert (int(starts) == 2) is (rows == 2)


def test_the_difference_of_gradients_takes_none_as_zero():
    one, other = [None, torch.tensor([3.0, 4.0]), None], [torch.tensor([2.0]), torch.tensor([3.0, 2.0]), None]
    expected = math.sqrt(4 + 4) / math.sqrt(4 + 13)
    assert updates.difference(one, other) == pytest.approx(expected)
    assert updates.difference([None, other[1], None], [None, other[1], None]) == 0


def test_random_states_are_left_as_they_were(run):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = states()
    with open_probe(KDTrainer, run(), 4) as probe:
        assert probe.problem is None
        assert states() != before
    assert states() == before


def test_a_teacher_that_is_offloaded_comes_back(run, folder, tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    batch = tokenizer(SENTENCES[:1], return_tensors="pt")
    before = teacher(**batch).logits
    arguments = run(teacher_model=teacher, settings={"teacher_device": "offload"})
    with open_probe(KDTrainer, arguments, 4) as probe:
        assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
        assert CHECKS["start"](probe).status == "ok"
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(**batch).logits, before)


def test_a_teacher_that_is_moved_comes_back():
    """A device without memory stands for the caller's."""
    with torch.device("meta"):
        teacher = nn.Linear(2, 3)
    with as_it_was(teacher):
        teacher.to_empty(device="cpu")
    assert teacher.weight.device.type == teacher.bias.device.type == "meta"


def test_a_student_that_is_its_own_teacher_is_found(examine, folder, tokenizer):
    student = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    for peft_config in (None, lora):
        finding = examine(
            "construction", model=student, teacher_model=student, processing_class=tokenizer, peft_config=peft_config
        )
        assert finding.status == "failure"
        assert "the student object itself" in finding.line


def test_memory_that_both_sides_share_is_found_unless_adapters_are_trained(examine, folder, tokenizer):
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / "teacher") for _ in range(2))
    teacher.model.embed_tokens.weight = student.model.embed_tokens.weight
    models = {"model": student, "teacher_model": teacher, "processing_class": tokenizer}
    finding = examine("construction", **models)
    assert finding.status == "failure"
    assert "the teacher's own memory" in finding.line
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    assert examine("construction", **models, peft_config=lora).status == "ok"


def test_the_loss_says_its_chunk(examine):
    finding = examine("loss", settings={"loss_chunk_size": 5})
    assert finding.numbers["chunk"] == 5
    assert finding.numbers["micro-batch"] > 0


def test_the_memory_is_the_plans(run):
    with open_probe(KDTrainer, run(), 16) as probe:
        probe.memory = 2**34
        finding = CHECKS["memory"](probe)
        assert finding.status == "ok"
        assert finding.numbers["row_tokens"] == max(len(ids) for ids, _ in probe.texts)


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_found_with_what_makes_it_fit(run):
    with open_probe(KDTrainer, run(), 16) as probe:
        probe.memory = 2**34
        probe.memory = CHECKS["memory"](probe).numbers["peak"] - 1
        finding = CHECKS["memory"](probe)
    assert finding.status == "failure"
    assert "--" in finding.remedy


def test_checkpoints_that_fill_the_disk_are_found(examine):
    assert examine("disk", settings={"save_steps": 50}).numbers["checkpoints"] == 2
    assert examine("disk", settings={"save_steps": 1, "max_steps": 10**9}).status == "failure"
    limited = examine("disk", settings={"save_steps": 1, "max_steps": 10**9, "save_total_limit": 1})
    assert limited.numbers["checkpoints"] == 2


def test_a_store_that_lacks_rows_is_found(run, examine, tmp_path):
    half = run(train_dataset=Dataset.from_dict({"text": SENTENCES[:4]}))
    KDTrainer(**half).write_cache(tmp_path / "store")
    store = f"cache:{tmp_path / 'store'}"
    finding = examine("construction", teacher_model=store)
    assert finding.status == "failure"
    assert "not in the store" in finding.line
    rows = Dataset.from_dict({"text": SENTENCES[:4]})
    assert examine("teacher's source", teacher_model=store, train_dataset=rows).status == "ok"
    with_model, stored = (
        examine("start", teacher_model=teacher, train_dataset=rows) for teacher in (half["teacher_model"], store)
    )
    (mine,), (theirs,) = with_model.numbers.values(), stored.numbers.values()
    assert mine == pytest.approx(theirs, rel=1e-2)


def test_a_teacher_at_an_address_is_measured_as_a_model(run, examine, folder, tokenizer):
    checks = ("teacher's perplexity", "start", "teacher's EOS")

    def numbers(**changes):
        with open_probe(KDTrainer, run(**changes), 4) as probe:
            found = [CHECKS[check](probe).numbers for check in checks]
            assert CHECKS["teacher's source"](probe).status == "ok"
        return [next(iter(each.values())) for each in found]

    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    with Stub(ServedModel(model, tokenizer, name="t"), max_logprobs=-1) as stub:
        served = numbers(settings={"teacher_logprobs": -1}, teacher_model=stub.url)
        few = {"settings": {"teacher_logprobs": 5, "teacher_timeout": 1}, "teacher_model": stub.url}
        assert "KL at least" in examine("start", **few).line
        with open_probe(KDTrainer, run(**few), 4) as probe:
            stub.kill()
            assert CHECKS["teacher's source"](probe).status == "failure"
    for mine, theirs in zip(served, numbers(), strict=True):
        assert mine == pytest.approx({name: theirs[name] for name in mine}, rel=1e-3)


@pytest.mark.parametrize(
    ("trainer_class", "config", "rows"),
    [
        (KVProjectionTrainer, KVProjectionConfig, None),
        (SpeculativeKDTrainer, lambda **kw: SpeculativeKDConfig(**kw, max_new_tokens=8), PROMPTS),
    ],
)
def test_other_trainers_are_examined(run, trainer_class, config, rows):
    changes = {} if rows is None else {"train_dataset": rows}
    found = diagnose(trainer_class, num_rows=8, **run(config=config, **changes))
    assert not [finding.line for finding in found.findings if "it stopped" in finding.line]
    assert found["construction"].status == found["split batches"].status == "ok"
    assert found["start"].numbers
    assert found["learning rate"].numbers
