"""KDConfig: what it refuses, and that it is still an SFTConfig for command lines and files."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from transformers import HfArgumentParser
from trl import SFTConfig

import hf_distill
from hf_distill import KDConfig, trainers
from hf_distill.losses.divergence import DIVERGENCES
from hf_distill.trainers.hard_label_config import checkpointing


def config(**changes) -> KDConfig:
    return KDConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd_weight": -0.1}, r"kd_weight has to lie in \[0, 1\], got -0.1"),
        ({"kd_weight": 1.5}, r"kd_weight has to lie in \[0, 1\], got 1.5"),
        ({"kd_weight": float("nan")}, r"kd_weight has to lie in \[0, 1\], got nan"),
        ({"temperature": 0.0}, "temperature has to be above 0.*got 0"),
        ({"temperature": -1.0}, "temperature has to be above 0.*got -1"),
        ({"temperature": float("inf")}, "temperature has to be above 0 and finite, got inf"),
        ({"divergence": "wasserstein"}, "'wasserstein' does not exist; choose one of .*forward_kl.*total_variation"),
        ({"divergence_params": {"beta": 0.5}}, "has beta, but forward_kl has no parameters"),
        (
            {"divergence": "jensen_shannon", "divergence_params": {"gamma": 0.5}},
            "has gamma, but jensen_shannon has only beta",
        ),
        ({"divergence": "jensen_shannon", "divergence_params": {"beta": 1.0}}, r"beta in \(0, 1\), got 1.0"),
        ({"divergence": "skew_forward_kl", "divergence_params": {"skew": 1.0}}, r"skew in \[0, 1\), got 1.0"),
        ({"divergence": "adaptive_kl", "divergence_params": {"head": "half"}}, "has to be a number, got 'half'"),
        ({"teacher_quantization": "2bit"}, "one of 4bit, 8bit, got '2bit'"),
        ({"loss_chunk_size": 0}, "loss_chunk_size has to be at least 1, got 0"),
        ({"loss_type": "dft"}, "loss_type='dft'.*Remove it"),
        ({"divergence_params": [1]}, r"divergence_params has to be JSON such as .*beta.*, got \[1\]"),
        ({"teacher_model_init_kwargs": "bf16"}, "teacher_model_init_kwargs has to be JSON such as .*, got 'bf16'"),
        ({"model_init_kwargs": "bf16"}, "model_init_kwargs has to be JSON such as .*, got 'bf16'"),
        ({"dataset_kwargs": "skip"}, "dataset_kwargs has to be JSON such as .*, got 'skip'"),
        ({"lr_scheduler_kwargs": "cycles"}, "lr_scheduler_kwargs has to be JSON such as .*, got 'cycles'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported.*Set it to 0"),
    ],
)
def test_setting_out_of_range_is_refused_in_words(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_ends_of_the_ranges_are_allowed():
    for changes in ({"kd_weight": 0}, {"kd_weight": 1}, {"temperature": 1e-3}, {"loss_chunk_size": 1}):
        config(**changes)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_every_divergence_is_a_setting_with_its_defaults(divergence):
    assert config(divergence=divergence).divergence == divergence


def test_quantisation_without_bitsandbytes_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setattr("hf_distill.teachers.loading.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'hf_distill\[quantization\]'"):
        config(teacher_quantization="4bit")


def test_an_optimizer_whose_package_is_missing_is_refused():
    if importlib.util.find_spec("schedulefree") is not None:
        pytest.skip("schedulefree is installed")
    with pytest.raises(ValueError, match=r"optim='schedule_free_adamw': .*install"):
        config(optim="schedule_free_adamw")


def test_liger_kernels_are_refused_where_they_cannot_run(monkeypatch):
    monkeypatch.setattr("hf_distill.trainers.hard_label_config.is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="use_liger_kernel=True needs Liger: pip install liger-kernel"):
        config(use_liger_kernel=True)
    monkeypatch.setattr("hf_distill.trainers.hard_label_config.is_liger_kernel_available", lambda: True)
    with pytest.raises(ValueError, match=r"use_liger_kernel=True needs a GPU.*Remove it"):
        config(use_liger_kernel=True)
    monkeypatch.setattr(KDConfig, "device", torch.device("cuda:0"))
    assert config(use_liger_kernel=True).use_liger_kernel


def test_defaults_of_sftconfig_are_kept_but_for_what_hides_losses_and_what_a_server_needs():
    own, base = ({f.name: f for f in dataclasses.fields(c)} for c in (KDConfig, SFTConfig))
    differing = [name for name, field in base.items() if own[name].default != field.default]
    assert set(differing) == {"dataloader_num_workers", "logging_nan_inf_filter"}
    assert config().dataloader_num_workers == 0
    assert config().logging_nan_inf_filter is False


def test_every_field_of_ours_is_explained():
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    for field in dataclasses.fields(KDConfig):
        if field.name not in inherited:
            assert field.metadata["help"].endswith("."), field.name


def test_command_line_gives_the_config_that_python_gives(tmp_path):
    values = {
        "kd_weight": 0.25,
        "temperature": 2.0,
        "divergence": "alpha_beta",
        "divergence_params": {"alpha": 0.2, "beta": 0.7},
        "teacher_model_init_kwargs": {"dtype": "bfloat16", "revision": "main"},
        "loss_chunk_size": 7,
    }
    words = ["--output_dir", "unused", "--use_cpu", "--bf16", "False", "--report_to", "none"]
    for name, value in values.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    (parsed,) = HfArgumentParser(KDConfig).parse_args_into_dataclasses(words)
    expected = config(**values)
    assert {name: getattr(parsed, name) for name in values} == {name: getattr(expected, name) for name in values}
    assert type(parsed.divergence_params["alpha"]) is float

    (tmp_path / "config.json").write_text(
        json.dumps({"output_dir": "unused", "use_cpu": True, "bf16": False, **values})
    )
    (from_file,) = HfArgumentParser(KDConfig).parse_json_file(str(tmp_path / "config.json"))
    assert from_file.divergence_params == values["divergence_params"]


def test_a_bad_choice_on_the_command_line_lists_the_allowed_ones(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(KDConfig).parse_args_into_dataclasses(["--divergence", "wasserstein"])
    assert "total_variation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "more"),
    [
        ("kd", False), ("eval_kd", False), ("eval_stories_kd", False), ("eval_my_loss_ce", False), ("loss", False),
        ("eval_hidden", False), ("aux_loss", False), ("eval_agreement", True), ("a_b_agreement", True),
        ("eval_kv/cosine", True), ("eval_code_kv/cosine_layer_3", True), ("eval_kv/cosine_my_kd_layer_0", True),
        ("eval_rollout/acceptance_rate", True), ("perplexity/stories", False), ("eval_perplexity", False),
        ("eval_accuracy", True), ("eval_my_loss", False),
    ],
)  # fmt: skip
def test_metrics_know_which_way_is_better(metric, more):
    args = config(metric_for_best_model=metric)
    assert args.greater_is_better is more
    assert config(metric_for_best_model=metric, greater_is_better=not more).greater_is_better is not more
    assert dataclasses.replace(args, seed=3).greater_is_better is more
    saved = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}  # masked there
    assert KDConfig(**saved).greater_is_better is more
    (parsed,) = HfArgumentParser(KDConfig).parse_args_into_dataclasses(
        [
            "--output_dir",
            "unused",
            "--use_cpu",
            "--bf16",
            "False",
            "--report_to",
            "none",
            "--metric_for_best_model",
            metric,
        ]
    )
    assert parsed.greater_is_better is more


@pytest.mark.parametrize("metric", ["eval_student_entropy", "num_tokens", "eval_code_kv/magnitude_ratio"])
def test_a_metric_without_a_direction_asks_for_one(metric):
    with pytest.raises(ValueError, match="set greater_is_better"):
        config(metric_for_best_model=metric)
    assert config(metric_for_best_model=metric, greater_is_better=True).greater_is_better


def test_a_plateau_of_a_metric_that_rises_is_one_from_above():
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    assert config(metric_for_best_model="agreement", **options).lr_scheduler_kwargs["mode"] == "max"
    assert "mode" not in (config(metric_for_best_model="kd", **options).lr_scheduler_kwargs or {})


@pytest.mark.parametrize("enabled", [False, True])
def test_checkpointing_is_set_by_the_name_that_warns_of_nothing(tmp_path, enabled, recwarn):
    args = KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **checkpointing(enabled))
    assert args.gradient_checkpointing is enabled
    assert [warning for warning in recwarn if "checkpointing" in str(warning.message)] == []


@pytest.mark.parametrize("name", ["KVProjectionConfig", "SpeculativeKDConfig"])
def test_the_old_import_path_of_a_config_gives_the_same_class_and_warns(name):
    with pytest.warns(DeprecationWarning, match=f"trainers.config.{name} is hf_distill.trainers.*{name} now"):
        assert getattr(trainers.config, name) is getattr(hf_distill, name)
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        from hf_distill.trainers.config import no_such_name  # noqa: F401
