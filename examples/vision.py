"""Distil a vision-language model: a student that sees learns from a larger one, on rows with pictures.

    python examples/vision.py --model HuggingFaceTB/SmolVLM-256M-Instruct \
        --teacher_model HuggingFaceTB/SmolVLM-500M-Instruct --dataset rows.jsonl --output_dir smolvlm-distilled

A line of rows.jsonl has the paths of its pictures, a question and an answer:

    {"images": ["shapes/1.png"], "prompt": [{"role": "user", "content": "How many?"}],
     "completion": [{"role": "assistant", "content": "Three red circles."}]}

The vision tower stays as it is. With --use_peft, adapters are trained in the language part alone.
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hf_distill import KDConfig, KDTrainer


@dataclass
class Arguments:
    model: str
    teacher_model: str
    dataset: str


def main(argv: list[str] | None = None) -> KDTrainer:
    arguments, args, model_config = TrlParser((Arguments, KDConfig, ModelConfig)).parse_args_and_config(argv)
    args.kd_weight, args.max_length = 1.0, None  # the pictures of a row may take more than 1,024 tokens
    is_file = arguments.dataset.endswith((".json", ".jsonl"))
    dataset = load_dataset("json", data_files=arguments.dataset) if is_file else load_dataset(arguments.dataset)
    rows = dataset["train"].train_test_split(test_size=0.1, seed=0)

    trainer = KDTrainer(
        model=arguments.model,
        teacher_model=arguments.teacher_model,  # its processor comes with it, and may see a picture in more tokens
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        peft_config=get_peft_config(model_config),
        quantization_config=get_quantization_config(model_config),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_kd", "eval_agreement"):
        print(f"{name}: {before[name]:.3f} -> {after[name]:.3f}")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
