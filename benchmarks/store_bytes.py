"""Bytes of a store on disk for each label-bearing token of a real text, with larger vocabularies.

    OMP_NUM_THREADS=1 python -m benchmarks.store_bytes --teacher SmolLM2-135M-Instruct --text squad/train.jsonl \\
        --column context

How many bytes a sample takes depends on how sure the teacher is, so the teacher is a real one. A larger vocabulary has
its tokens and further ones that no text contains. Their rows of the head are copies of the row of the token that is
least likely in the mean, so the distributions stay what they are but for a small rest. Each store is written by
`trainer.write_cache`; what is counted are the sizes of its files: shards with their indices and checksums, and the
manifest. Head, rounding and tokenizer are written once, whatever the number of tokens, and are listed apart.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.measure import machine, print_table
from hf_distill import KDConfig, KDTrainer
from hf_distill.store.head import HEAD, ROUNDING
from hf_distill.teachers.stored import TOKENIZER
from hf_distill.teachers.writing import Method

METHODS = {
    "hidden, float16": Method(),
    "hidden, int8": Method(dtype="int8"),
    "sampled, 12 entries": Method("sampled"),
    "top-12 and the rest": Method("topk"),
}
ONCE = {HEAD, ROUNDING, TOKENIZER}  # files and a folder whose size does not depend on the number of tokens


def widened(folder: str, vocab_size: int, texts: list[str]) -> tuple[PreTrainedModel, Any]:
    """The model of a folder and its tokenizer, with further tokens that are as unlikely as its least likely one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    number = vocab_size - len(tokenizer)
    if number < 0:
        raise ValueError(f"{folder} has {len(tokenizer)} tokens, more than {vocab_size}")
    if number:
        ids = tokenizer(texts[:8], return_tensors="pt", padding=True, truncation=True, max_length=256)
        with torch.no_grad():
            least = model(**ids).logits.log_softmax(-1).mean((0, 1)).argmin()
        old = model.lm_head.weight.data
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        model.lm_head.weight.data[len(old) :] = old[least]
        tokenizer = with_more_tokens(tokenizer, number)
    return model, tokenizer


def with_more_tokens(tokenizer: Any, number: int) -> Any:
    """The tokenizer with tokens that no merge leads to."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        content = json.loads(path.read_text("utf-8"))
        content["model"]["vocab"] |= {f"<more {i}>": len(tokenizer) + i for i in range(number)}
        path.write_text(json.dumps(content), "utf-8")
        return AutoTokenizer.from_pretrained(folder)


def make_writer(folder: str, teacher: PreTrainedModel, tokenizer: Any, texts: list[str], length: int) -> KDTrainer:
    """A trainer whose rows are the texts; its student is tiny, since only the teacher is asked."""
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    settings = KDConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], max_length=length, per_device_eval_batch_size=4
    )
    rows = Dataset.from_dict({"text": texts})
    return KDTrainer(student, teacher, settings, rows, processing_class=tokenizer, teacher_processing_class=tokenizer)


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the files that grow with the text, the manifest included, and of those that are written once."""
    growing = once = 0
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if path.relative_to(folder).parts[0] in ONCE:
            once += path.stat().st_size
        else:
            growing += path.stat().st_size
    return growing, once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a causal model with tied heads and a BPE tokenizer")
    parser.add_argument("--text", required=True, type=Path, help="JSON lines")
    parser.add_argument("--column", default="text", help="the text of a line")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text that are read")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[49_152, 131_072, 262_144])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    disable_progress_bars()
    with open(options.text, encoding="utf-8") as file:
        texts = list(dict.fromkeys(json.loads(line)[options.column] for line in file))[: options.texts]
    table = []
    for vocab_size in options.vocab_sizes:
        teacher, tokenizer = widened(options.teacher, vocab_size, texts)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_writer(folder, teacher, tokenizer, texts, options.length)
            for name in options.methods:
                manifest = trainer.write_cache(Path(folder, name), METHODS[name])
                if manifest.vocab_size != vocab_size:
                    raise RuntimeError(f"a store of {manifest.vocab_size} tokens, not {vocab_size}")
                growing, once = sizes(Path(folder, name))
                row = {
                    "tokens of the vocabulary": f"{vocab_size:,}",
                    "store": name,
                    "label-bearing tokens": f"{manifest.counts['positions']:,}",
                    "bytes a token": f"{growing / manifest.counts['positions']:.2f}",
                    "head and the like, MB": f"{once / 1e6:.1f}",
                }
                table.append(row)
                print(row, flush=True)
    print(machine("cpu"))
    print_table("bytes on disk", table, options.markdown)


if __name__ == "__main__":
    main()
