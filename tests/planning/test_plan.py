"""Whole plans: sums, verdicts, remedies, recipes, and the commands."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from hf_distill import KDConfig, KVProjectionConfig, SpeculativeKDConfig, cli
from hf_distill.planning import Machine, parse_size, plan_run, without_gpu
from hf_distill.planning.remedies import CHANGES
from hf_distill.planning.settings import read_settings
from hf_distill.store.manifest import Manifest
from hf_distill.trainers.hard_label_config import HardLabelConfig
from tests.planning.published import CONFIGS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
# The GPU that each recipe, or folder of recipes, names; those of docs/kd_lora.md have the teacher on a second one.
GPUS = {
    "kd_lora": "24GB", "kava": "8GB", "on_policy_gkd": "24GB", "lupi_skd_two_gpus": "24GB",
    "remote_qwen2.5_7b": "80GB",
    "cache_qwen2.5_0.5b": "24GB", "dolly_phi2_mistral": "24GB", "kava_8gb": "8GB", "kava_8gb_low_memory": "8GB",
    "kd_lora_24gb": "24GB", "kd_vl_24gb": "24GB", "kd_qwen2.5_0.5b": "80GB", "lupi_skd": "80GB", "skd_gsm8k": "80GB",
}  # fmt: skip


@pytest.fixture
def settings(folder):
    """Models of the tests and settings of a small run."""
    options = {"output_dir": "out", "use_cpu": True, "bf16": False, "max_length": 32, "per_device_train_batch_size": 4}
    return str(folder / "student"), str(folder / "teacher"), options


@pytest.mark.parametrize(
    "setting",
    [{"fp16": True, "bf16": False}, {"tf32": True}, {"use_liger_kernel": True}, {"teacher_quantization": "4bit"}],
)
def test_what_this_machine_lacks_can_be_planned(folder, monkeypatch, setting):
    monkeypatch.setattr("hf_distill.teachers.loading.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr("hf_distill.trainers.hard_label_config.is_liger_kernel_available", lambda: False)
    options = {"output_dir": "out", "max_length": 32, **setting}
    with pytest.raises(ValueError, match=r"needs|requires"):
        KDConfig(**{"bf16": False, **options})
    with without_gpu():
        args = KDConfig(**options)
    assert plan_run(str(folder / "student"), str(folder / "teacher"), args, machine=Machine(4 << 30)).fits


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_states_of_8_bit_optimizers_are_those_that_they_make(optim, settings):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    student, teacher, options = settings
    plan = plan_run(student, teacher, KDConfig(**options, optim=optim))
    model = AutoModelForCausalLM.from_pretrained(student)
    optimizer = (bitsandbytes.optim.AdamW8bit if "8bit" in optim else bitsandbytes.optim.AdamW32bit)(model.parameters())
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, 0, index)
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for each in state.values()
        if isinstance(each, torch.Tensor)
    }
    assert plan.always["optimizer's states"] == sum(storages.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"row_tokens": 0}, "row_tokens has to be at least 1, got 0"),
        ({"prompt_tokens": -3}, "prompt_tokens has to be at least 1, got -3"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "is trained in adapters: add --use_peft"),
    ],
)
def test_what_no_run_could_have_is_not_planned(settings, given, message):
    student, teacher, options = settings
    with pytest.raises(ValueError, match=message):
        plan_run(student, teacher, KDConfig(**options), **given)


def test_parts_sum_to_the_peak_of_the_highest_phase(settings):
    student, teacher, options = settings
    plan = plan_run(student, teacher, KDConfig(**options, gradient_accumulation_steps=2))
    assert sum(plan.parts.values()) == plan.peak == max(plan.phases.values())
    assert plan.fits is None
    assert plan.remedies == ()


def test_a_plan_shows_itself_as_its_tables(settings):
    student, teacher, options = settings
    plan = plan_run(student, teacher, KDConfig(**options), machine=Machine(1, kind="cpu"))
    for text in (repr(plan), plan._repr_markdown_()):
        assert "an update on all devices" in text
        for part in plan.parts:
            assert part in text
        assert len(plan.remedies) > 1
        assert "It does not fit" in text


def test_stores_remote_teachers_and_the_own_base_have_no_weights(settings):
    from peft import LoraConfig

    student, teacher, options = settings
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    assert "teacher's weights" in plan_run(student, teacher, KDConfig(**options)).always
    for name in ("base", "http://localhost:8000/v1"):
        assert "teacher's weights" not in plan_run(student, name, KDConfig(**options), peft_config=lora).always
    assert "teacher's weights" not in plan_run(student, None, HardLabelConfig(**options)).always


@pytest.mark.parametrize(
    ("device", "here", "elsewhere"),
    [
        ("offload", "heads of teachers", "host: the teacher's weights"),
        ("cuda:1", "heads of teachers", "teacher's devices"),
    ],
)
def test_a_teacher_elsewhere_leaves_its_head_here(settings, device, here, elsewhere):
    student, teacher, options = settings
    plan = plan_run(student, teacher, KDConfig(**options, teacher_device=device))
    assert plan.always[here] == 384 * 32 * 4
    assert "teacher's weights" not in plan.always
    assert plan.elsewhere[elsewhere] > 0


@pytest.mark.slow
def test_engines_that_split_need_less_of_each_device(settings):
    student, teacher, options = settings
    found = {
        engine: plan_run(student, teacher, KDConfig(**options), machine=Machine(num=4, engine=engine, kind="cpu"))
        for engine in ("ddp", "zero2", "zero3", "fsdp2")
    }
    assert found["zero2"].always["optimizer's states"] < found["ddp"].always["optimizer's states"]
    assert found["fsdp2"].always["student's weights"] < found["zero2"].always["student's weights"]
    assert found["ddp"].always["DDP's buckets"] == 4 * found["ddp"].counts["trained parameters"]
    assert found["zero2"].always["ZeRO's bucket of gradients"] == 4 * 500_000_000  # DeepSpeed's default, made whole
    for plan in found.values():
        assert plan.traffic["gradients"] > 0


def test_fsdp2_keeps_whole_gradients_over_micro_batches(settings):
    student, teacher, options = settings
    one, two = (
        plan_run(
            student, teacher, KDConfig(**options, gradient_accumulation_steps=number),
            machine=Machine(num=2, engine="fsdp2", kind="cpu"),
        )
        for number in (1, 2)
    )  # fmt: skip
    whole = 4 * two.counts["trained parameters"]
    assert two.parts["gradients"] == whole
    assert one.parts["gradients"] == pytest.approx(whole / 2, rel=0.01)
    assert two.phases["optimizer's step"] == pytest.approx(one.phases["optimizer's step"], rel=0.01)


@pytest.mark.parametrize(("more", "packing", "is_told"), [(0, False, False), (1, False, True), (1, True, False)])
def test_rows_that_no_model_has_positions_for_are_told(settings, more, packing, is_told):
    student, teacher, options = settings
    longest = AutoConfig.from_pretrained(student).max_position_embeddings
    args = KDConfig(**{**options, "max_length": longest + more, "packing": packing})
    notes = plan_run(student, teacher, args).notes
    told = [note for note in notes if f"was made for {longest:,} tokens, and rows of {longest + more:,}" in note]
    assert len(told) == 2 * is_told  # of either side


def test_a_teacher_with_longer_prompts_is_told_about_alone(settings):
    student, teacher, options = settings
    longest = AutoConfig.from_pretrained(teacher).max_position_embeddings
    args = SpeculativeKDConfig(**{**options, "max_length": None, "max_new_tokens": 8})
    notes = plan_run(student, teacher, args, prompt_tokens=8, teacher_prompt_tokens=longest).notes
    assert [note for note in notes if "was made for" in note and note.startswith(teacher)] == [
        note for note in notes if "was made for" in note
    ]
    assert any(f"rows of {longest + 8:,}" in note for note in notes)


STORED = {
    "sampled": {"entries": 12, "sampler": "threshold"},
    "topk": {"entries": 12},
    "hidden": {"dtype": "float16"},
}


@pytest.mark.parametrize("combination", ["mixture", "sum"])
@pytest.mark.parametrize("other", ["a server", *STORED])
def test_teachers_of_all_kinds_are_planned_beside_a_model(settings, tmp_path, other, combination):
    student, teacher, options = settings
    args = KDConfig(**options, teacher_combination=combination)
    name = "http://localhost:1/v1"
    if other in STORED:
        head = {"dtype": "float32", "width": 32, "rows": 384, "bytes": 4 * 384 * 32} if other == "hidden" else None
        Manifest(other, STORED[other], {}, {}, 384, 1.0, 0, head=head).write(tmp_path)
        name = f"cache:{tmp_path}"
    both, alone = (plan_run(student, names, args) for names in ([name, teacher], [teacher]))
    assert both.parts["teacher's weights"] == alone.parts["teacher's weights"] > 0
    assert both.peak > alone.peak


def test_notes_name_the_model_that_they_are_about(settings, tmp_path, monkeypatch):
    """Also where a teacher before it is no model."""
    student, teacher, options = settings
    AutoConfig.from_pretrained(teacher, num_hidden_layers=7).save_pretrained(tmp_path)
    monkeypatch.setattr("hf_distill.planning.settings._is_quantised", lambda config: config.num_hidden_layers == 7)
    notes = plan_run(student, ["http://localhost:1/v1", str(tmp_path)], KDConfig(**options)).notes
    assert any(note.startswith(f"the weights of {tmp_path} are saved quantised") for note in notes)


@pytest.mark.slow
def test_a_run_that_does_not_fit_has_remedies_that_do(settings):
    student, teacher, options = settings
    options |= {"per_device_train_batch_size": 8, "max_length": 128, "gradient_checkpointing": False}
    whole = plan_run(student, teacher, KDConfig(**options))
    machine = Machine(memory=int(0.8 * whole.peak), reserve=0, kind="cpu")
    plan = plan_run(student, teacher, KDConfig(**options), machine=machine)
    assert plan.fits is False
    fitting = [remedy for remedy in plan.remedies if remedy.fits]
    assert fitting
    assert all(remedy.peak <= machine.memory for remedy in fitting)
    # The remedy's own options make the plan that it promises.
    batch = next(remedy for remedy in plan.remedies if remedy.name == "smaller micro-batches")
    words = batch.options.split()
    changed = options | {words[0][2:]: int(words[1]), words[2][2:]: int(words[3])}
    assert plan_run(student, teacher, KDConfig(**changed)).peak == batch.peak


@pytest.mark.slow
def test_nothing_helps_a_model_that_is_larger_than_the_device(settings):
    student, teacher, options = settings
    plan = plan_run(student, teacher, KDConfig(**options), machine=Machine(memory=1000, reserve=0))
    assert plan.fits is False
    assert not any(remedy.fits for remedy in plan.remedies)
    assert plan.together == ()


def test_rollouts_have_caches_and_a_phase(settings):
    student, teacher, options = settings
    options |= {"max_length": None, "max_new_tokens": 16}
    plan = plan_run(student, teacher, SpeculativeKDConfig(**options), prompt_tokens=8)
    slots = 128  # for 23 tokens
    assert plan.caches == dict.fromkeys(("student", "teacher"), 2 * 2 * 2 * 4 * slots * 8 * 4)
    assert "rollout" in plan.phases


def test_smaller_micro_batches_write_fewer_rows_unless_their_number_was_chosen(settings):
    student, teacher, options = settings
    options |= {"max_length": None, "max_new_tokens": 16, "gradient_accumulation_steps": 3}
    changes = {change.name: change for change in CHANGES}
    change, smaller = changes["fewer rows written at a time"], changes["smaller micro-batches"]
    for chosen, after, fewer in ((None, 1, 2), (6, 6, 3), (50, 12, 6)):
        args = SpeculativeKDConfig(**options, rollout_batch_size=chosen)
        read = read_settings(
            student, teacher, args, peft_config=None, quantization_config=None, machine=Machine(), row_tokens=None,
            prompt_tokens=8, teacher_prompt_tokens=None, label_share=1.0,
        )  # fmt: skip
        assert read.with_rows(1).rollout_rows == after
        changed, option = change.apply(read)
        assert (changed.rollout_rows, option) == (fewer, f"--rollout_batch_size {fewer}")
        odd = replace(read, batch=replace(read.batch, rows=5), accumulation=3)
        changed, option = smaller.apply(odd)  # 2 x 8 would be another update
        assert option == "--per_device_train_batch_size 1 --gradient_accumulation_steps 15"


@pytest.mark.slow
def test_keys_and_values_have_a_projector(settings):
    student, teacher, options = settings
    plain = plan_run(student, teacher, KDConfig(**options))
    for projector in ("pca", "mlp"):
        plan = plan_run(student, teacher, KVProjectionConfig(**options, projector=projector))
        assert plan.always["student's weights"] > plain.always["student's weights"]


@pytest.mark.parametrize("text", ["24GB", "24 GiB", "24gb", "24576MB"])
def test_sizes_of_devices(text):
    assert parse_size(text) == 24 * 2**30


@pytest.mark.parametrize("text", ["", "much", "-3GB", "GB", "24", "24B"])
def test_strange_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is no size such as 24GB"):
        parse_size(text)


# ------------------------------------------------------------------------------------------------------- the commands


def words(folder, *more):
    return [
        "--model", str(folder / "student"), "--teacher_model", str(folder / "teacher"), "--use_cpu", "--bf16", "no",
        "--max_length", "32", "--output_dir", "out", *more,
    ]  # fmt: skip


def test_the_command_prints_tables_and_a_verdict(folder, capsys):
    cli.main(["plan", "kd", *words(folder, "--gpu", "24GB")])
    out = capsys.readouterr().out
    assert "It fits" in out
    assert "optimizer's states" in out


def test_the_exit_code_tells_a_script_what_does_not_fit(folder, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", "kd", *words(folder, "--gpu", "1MB", "--reserve", "1KB", "--json")])
    assert error.value.code == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_the_options_of_a_change_can_be_copied_from_a_narrow_terminal(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        cli.main(["plan", "kd", *words(folder, "--gpu", "1MB", "--per_device_train_batch_size", "64")])
    batches = "--per_device_train_batch_size 1 --gradient_accumulation_steps 64"
    assert f"smaller micro-batches: {batches}" in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_example_of_the_page_is_what_the_command_prints(capsys):
    page = (ROOT / "docs" / "plan.md").read_text()
    command, shown = re.search(r"\$ hf-distill (plan .*?)\n(\{\n.*?\n\})\n```", page, re.DOTALL).groups()
    cli.main([str(CONFIGS.get(word, word)) for word in command.replace("\\\n", " ").split()])
    printed = json.loads(capsys.readouterr().out)
    for name, numbers in json.loads(shown).items():
        assert printed[name] == pytest.approx(numbers, rel=1e-3), name


@pytest.mark.parametrize("more", [["--gpu", "big"], ["--engine", "horovod"], ["--label_share", "2"]])
def test_settings_that_cannot_be_planned_exit_with_2(folder, capsys, more):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", "kd", *words(folder, *more)])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def planned(path, capsys, store, *more):
    """The plan of a recipe for the GPU that it names; one for stores is planned with an empty one."""
    recipe = yaml.safe_load(path.read_text())
    trainer = "skd" if "max_new_tokens" in recipe else "kv" if "kv_weight" in recipe else "kd"
    gpu = GPUS[path.stem if path.parent.name == "recipes" else path.parent.name]
    paths = [str(CONFIGS.get(recipe[side], recipe[side])) for side in ("model", "teacher_model")]  # or an address
    if path.stem.startswith("cache"):
        Manifest("sampled", {"entries": 12, "sampler": "threshold"}, {}, {}, 151_665, 1.0, 0).write(store)
        paths[1] = f"cache:{store}"
    if path.stem == "kd_vl_24gb":
        more = (*more, "--picture_tokens", "1024")
    argv = ["plan", trainer, "--config", str(path), "--model", paths[0], "--teacher_model", paths[1], *more]
    try:
        cli.main([*argv, "--gpu", gpu, "--json"])
    except SystemExit as error:
        assert error.code == 1  # noqa: PT017
    return json.loads(capsys.readouterr().out)


def test_every_recipe_names_a_gpu():
    assert set(GPUS) == {path.stem if path.parent.name == "recipes" else path.parent.name for path in RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_gpu_that_they_name(path, capsys, tmp_path):
    plan = planned(path, capsys, tmp_path, *(["--gpus", "2"] if path.stem == "lupi_skd_two_gpus" else []))
    assert plan["fits"], (path.stem, plan["peak"] / 2**30, plan["parts"], plan["remedies"])


@pytest.mark.slow
def test_the_recipes_of_lora_fit_one_gpu_as_well(capsys, tmp_path):
    recipe = ROOT / "examples" / "recipes" / "kd_lora" / "rank16.yaml"  # which trains the most
    assert planned(recipe, capsys, tmp_path, "--teacher_device", "None")["fits"]


@pytest.mark.slow
def test_a_recipe_is_planned_without_weights_or_rows(capsys, tmp_path):
    plan = planned(ROOT / "examples" / "recipes" / "kava_8gb.yaml", capsys, tmp_path)
    assert plan["fits"]
    assert plan["counts"]["student's parameters"] > 494_032_768  # and those of adapters
    assert plan["counts"]["teacher's parameters"] == 1_543_714_304
