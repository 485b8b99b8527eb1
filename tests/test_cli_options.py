"""The table of options and the help made of it, against the dataclasses that they describe."""

import copy
from collections import Counter

import pytest

from hf_distill import HardLabelConfig, KDConfig, SpeculativeKDConfig, cli
from hf_distill.cli import options as options_module
from hf_distill.cli import parsing
from hf_distill.cli.commands import COMMANDS
from hf_distill.cli.helping import GROUPS, GROUPS_OF, INHERITED, REFUSED, help_text
from hf_distill.cli.options import TABLE, described_options, installed_options, is_current, options_of
from tests.test_cli import error_of

TRAINING = [name for name, command in COMMANDS.items() if command.inherits]


def test_the_table_is_that_of_the_dataclasses():
    classes = {name for command in COMMANDS.values() for name in command.options}
    described, written = options_module.describe(classes), copy.deepcopy(options_module._table())
    if not is_current():  # fields of other libraries may differ
        for table in (described, written):
            del table["versions"]
            table["classes"] = {name: entry for name, entry in table["classes"].items() if "hf_distill" in name}
    assert described == written, "run `python -m hf_distill.cli.options`"
    if is_current():
        assert TABLE.read_text(encoding="utf-8") == options_module.written(described)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_can_be_parsed_from_the_table_alone(name):
    classes = COMMANDS[name].options
    found = described_options(classes)
    assert sum(len(described_options([each])) for each in classes) == len(found)  # no name stands for two options
    for option in found.values():
        assert option.kind in options_module.KINDS, option
        assert option.nargs in (None, "+", "?"), option
        assert all(isinstance(choice, str) for choice in option.choices), option


def test_other_versions_of_the_libraries_say_themselves_what_their_options_are(monkeypatch, capsys):
    classes = COMMANDS["kd"].options
    known = options_of(classes)
    monkeypatch.setattr(options_module, "is_current", lambda: False)
    found = options_of(classes)
    if is_current():
        assert list(found) == list(known)
        for name, option in known.items():
            assert (option.kind, option.nargs, option.choices) == (
                found[name].kind, found[name].nargs, found[name].choices
            )  # fmt: skip
    monkeypatch.setattr(parsing, "is_current", lambda: False)
    assert "did you mean --learning_rate?" in error_of(capsys, ["--learning_rte", "1"])


def test_an_option_that_only_the_installed_libraries_have_is_taken(monkeypatch, capsys):
    table = copy.deepcopy(options_module._table())
    rows = table["classes"]["trl:SFTConfig"]["options"]
    rows[:] = [row for row in rows if row["name"] != "weight_decay"]
    for module in (options_module, parsing):
        monkeypatch.setattr(module, "is_current", lambda: False)
    monkeypatch.setattr(options_module, "_table", lambda: table)
    words = ["--model", "a", "--teacher_model", "b", "--dataset", "c", "--use_cpu", "--bf16", "no"]
    for flag in ("--weight_decay", "--weight-decay", "--weight_dec"):
        assert parsing.read_command("kd", [*words, flag, "0.25"])[1].weight_decay == 0.25
    assert "there is no option --weight_deky; did you mean" in error_of(capsys, ["--weight_deky", "1"])
    assert "there is no option --weight(" in error_of(capsys, ["--weight(", "1"])


@pytest.mark.parametrize("name", TRAINING)
def test_every_option_of_our_own_is_in_a_group_and_every_listed_one_has_help(name):
    groups = Counter(option for names in GROUPS.values() for option in names.split())
    assert set(groups.values()) == {1}
    found = described_options(COMMANDS[name].options)
    refused = REFUSED[name].split()
    assert {option.name for option in found.values() if option.help} - set(refused) <= groups.keys()
    assert set(refused) <= found.keys()
    listed = [option for option in found.values() if option.name in groups and option.name not in refused]
    assert [option.name for option in listed if not (option.help or INHERITED.get(option.name))] == []
    assert set(INHERITED) <= groups.keys()


@pytest.mark.parametrize("name", GROUPS_OF)
def test_groups_of_a_command_have_all_of_its_options_once(name):
    listed = [option for names in GROUPS_OF[name].values() for option in names.split()]
    assert sorted(listed) == sorted(described_options(COMMANDS[name].options))


REFUSALS = {
    "loss_type": "dft", "label_smoothing_factor": 0.1, "enable_jit_checkpoint": True, "max_length": 9, "packing": True,
    "eval_packing": True, "padding_free": True, "assistant_only_loss": True, "completion_only_loss": False,
    "hidden_weight": 1.0, "bf16_full_eval": True, "fp16_full_eval": True,
}  # fmt: skip
# Refused by the commands themselves, or without a use where `hidden_weight` is refused.
OTHERS = {
    "model_name_or_path", "resume_from_checkpoint", "baseline", "hidden_layers", "hidden_loss",
    "projector_learning_rate",
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINING)
def test_what_is_not_listed_is_refused(name):
    config = {"sft": HardLabelConfig, "skd": SpeculativeKDConfig}.get(name.split()[-1], KDConfig)
    for option in REFUSED[name].split():
        if option not in OTHERS:
            with pytest.raises(ValueError, match=option.removeprefix("eval_")):
                config(output_dir="out", use_cpu=True, bf16=False, **{option: REFUSALS[option]})


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_options_that_people_set_in_groups(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown == help_text(name)
    assert max(map(len, shown.splitlines())) <= 100
    assert len(shown.splitlines()) < 200
    assert f"usage: hf-distill {name}" in shown
    if COMMANDS[name].inherits:
        for text in ("models:", "LoRA:", "--learning_rate NUMBER", "--lora_r NUMBER", "--help-all"):
            assert text in shown, text
        assert not any(f"--{option} " in shown for option in REFUSED[name].split())


def test_all_options_are_shown_if_all_are_asked_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["skd", "--help-all"])
    shown = capsys.readouterr().out
    options = installed_options(COMMANDS["skd"].options)
    refused = set(REFUSED["skd"].split())
    for name in options:
        assert (f"  --{name} " in shown or f"  --{name}\n" in shown) != (name in refused), name
