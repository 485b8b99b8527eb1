"""The demo's text and teacher; the demo itself runs in full in continuous integration."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import cli, demo
from hf_distill.demo.text import Storyteller, stories
from hf_distill.demo.train_teacher import held_out_losses, train_tokenizer
from tests.test_page import read_page


def test_stories_are_the_same_on_every_machine_and_a_smaller_number_is_a_prefix():
    texts = stories(300, seed=5)
    assert stories(20, seed=5) == texts[:20]
    assert stories(20, seed=6) != texts[:20]
    assert hashlib.md5("".join(stories(3000, seed=5)).encode()).hexdigest() == "f047869d1d09e7b1e383990b2342c6f1"
    assert all(text.isascii() for text in texts)


def test_choices_come_with_the_probability_that_the_storyteller_counts():
    teller = Storyteller(seed=0)
    counts = dict.fromkeys("abc", 0)
    for _ in range(6000):
        counts[teller.pick("a", "b", "c")] += 1
    expected = {"a": 6 / 11, "b": 3 / 11, "c": 2 / 11}
    for option, share in expected.items():
        deviation = (share * (1 - share) / 6000) ** 0.5
        assert abs(counts[option] / 6000 - share) < 4 * deviation
    entropy = -sum(p * torch.tensor(p).log().item() for p in expected.values())
    assert teller.nats / 6000 == pytest.approx(entropy, rel=0.02)


def test_the_packaged_teacher_is_small_and_nearly_as_good_as_the_grammar():
    folder = Path(demo.TEACHER)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss, bound = held_out_losses(model, tokenizer, num_stories=200, seed=77)
    assert bound - 0.01 < loss < bound + 0.02


def test_the_tokenizer_is_the_one_that_the_script_trains():
    """The script is how the teacher was made: its tokenizer comes out the same, token for token."""
    teller = Storyteller(0)
    trained = train_tokenizer([teller.tell() for _ in range(5000)], vocab_size=640)
    assert trained.get_vocab() == AutoTokenizer.from_pretrained(demo.TEACHER).get_vocab()


def test_the_demo_runs_end_to_end(tmp_path, monkeypatch, capsys):
    """Few steps: the machinery, not the claim."""
    monkeypatch.setattr(demo, "NUM_HELD_OUT", 20)
    results = demo.run_demo(str(tmp_path), num_steps=20)
    assert set(results) == {"teacher", "untrained student", "hard labels only", "distilled"}
    assert results["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["distilled"]["kl"] < results["untrained student"]["kl"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert (tmp_path / "report.png").exists()
    data, _ = read_page(tmp_path / "report.html")
    (texts,) = data["texts"]
    assert [row[""] for row in texts["rows"]] == ["teacher", "hard labels only", "distilled"]
    hard, distilled = (dict(run["about"]) for run in data["runs"])
    assert hard["student"] == distilled["student"] == "a random Llama of 2 layers"
    assert (hard.get("teacher"), distilled["teacher"]) == (None, "the packaged Llama of 4 layers")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.index("of the untrained student") < printed.index("KL to the teacher")
    for name in ("teacher", "hard labels only", "distilled"):
        assert f" {name}: ... " in printed
    assert f"Open {tmp_path / 'report.html'} in a browser" in printed


def test_a_demo_without_seeds_or_steps_is_refused(capsys):
    for name in ("seeds", "steps"):
        with pytest.raises(SystemExit):
            cli.main(["demo", f"--{name}", "0"])
        assert f"--{name} has to be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "share"), [(demo.STEPS, 0.92), (400, 0.85)])
def test_distillation_wins_over_three_seeds(tmp_path, steps, share):
    results = demo.run_demo(str(tmp_path), num_seeds=3, num_steps=steps)
    assert results["distilled"]["kl"] < share * results["hard labels only"]["kl"]
    assert results["distilled"]["student_perplexity"] < results["hard labels only"]["student_perplexity"]
