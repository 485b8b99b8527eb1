"""Measure the cost of quantising a teacher: the divergence of the quantised model from the model as it was saved.

    python examples/quantized_teacher.py --teacher path/or/id --data rows.jsonl

Rows have a "text" column. A student cannot learn from the quantised teacher what it has lost.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_distill import evaluate_fidelity
from hf_distill.report import markdown, measured_on, result_rows


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    rows = load_dataset("json", data_files=options.data, split="train")
    rows = rows.select(range(min(options.rows, len(rows))))
    whole = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="auto", device_map={"": options.device})
    kinds = {
        "NF4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "FP4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    results = {}
    for name, config in kinds.items():
        quantised = AutoModelForCausalLM.from_pretrained(
            options.teacher, quantization_config=config, device_map={"": options.device}
        )
        results[name] = evaluate_fidelity(quantised, whole, rows, tokenizer, max_length=options.max_length)
    print(markdown(result_rows(results)), f"measured on {measured_on(results)}", sep="\n")
    return results


if __name__ == "__main__":
    main()
