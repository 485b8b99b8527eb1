"""The command line with a teacher at an address, and the example."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import cli
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub
from tests.test_cli import error_of, options
from tests.test_page import read_page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stub(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype="float32")
    model.lm_head.weight.data.mul_(8)
    with Stub(ServedModel(model, AutoTokenizer.from_pretrained(folder / "teacher"), name="big")) as stub:
        yield stub


RUN = {"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 2, "save_strategy": "no"}


def test_kd_learns_from_an_address_and_says_so(folder, stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    stub.api_key = "sk-secret"
    given = options(folder, output_dir=tmp_path, teacher_model=stub.url, eval_dataset=folder / "rows.jsonl", **RUN)
    cli.main(["kd", *given, "--teacher_key_variable", "TEACHER_KEY", "--teacher_logprobs", "15"])
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["teacher_model"] == [stub.url]
    assert settings["teacher_outputs"] == "a server: vLLM 0.32.0, the 15 most likely tokens"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["student_perplexity"] < report["before"]["student_perplexity"]
    assert "kl" not in report["after"]  # a lower bound of it is known
    for page in ("report.md", "README.md"):
        text = (tmp_path / page).read_text()
        assert "from a server: vLLM 0.32.0, the 15 most likely tokens" in text, page
    data, _ = read_page(tmp_path / "report.html")
    (run,) = data["runs"]
    assert dict(run["about"])["teacher"] == stub.url
    assert run["tokens"]["kl_is"] == "lower bound"
    kl = [value for row in run["tokens"]["rows"] for value in row["kl"]]
    assert sum(kl) / len(kl) == pytest.approx(report["after"]["eval_kd"], rel=1e-3)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes(), path
    assert "sk-secret" not in "".join(capsys.readouterr())


def test_an_address_where_nobody_is_makes_one_line(folder, stub, tmp_path, capsys):
    stub.kill()
    message = error_of(capsys, options(folder, output_dir=tmp_path, teacher_model=stub.url, **RUN))
    assert "nothing answers at port" in message


def test_a_server_that_goes_makes_one_line_and_exit_code_1(folder, stub, tmp_path, capsys):
    given = options(folder, output_dir=tmp_path, teacher_model=stub.url, **{**RUN, "max_steps": 12})
    stub.fail("status", status=503, times=None, after=16)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["kd", *given, "--teacher_timeout", "1"])
    assert stopped.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hf-distill kd: error: the teacher at http://127.0.0.1")


def test_a_store_is_written_of_an_address(folder, stub, tmp_path, capsys):
    given = options(folder, output_dir=tmp_path / "store", teacher_model=stub.url, store="topk", entries=9)
    cli.main(["cache", "write", *given, "--dry_run"])
    assert "top-k, 9 entries" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    cli.main(["cache", "write", *given])
    capsys.readouterr()
    cli.main(["cache", "info", str(tmp_path / "store")])
    assert "big" in capsys.readouterr().out
    cli.main(["kd", *options(folder, output_dir=tmp_path / "out", teacher_model=f"cache:{tmp_path / 'store'}", **RUN)])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["cache", "write", *given, "--output_dir", str(tmp_path / "b"), "--entries", "30"])
    assert "tells the 20 most likely tokens" in capsys.readouterr().err


def test_the_example_trains_from_an_address(folder, stub, tmp_path):
    spec = importlib.util.spec_from_file_location("remote_example", ROOT / "examples" / "remote.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    results = example.main([
        "--student", str(folder / "student"), "--teacher", stub.url, "--data", str(folder / "rows.jsonl"),
        "--steps", "3", "--output_dir", str(tmp_path), "--use_cpu",
    ])  # fmt: skip
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"]
