"""Distil on text that student and teacher generate together.

    python examples/speculative_kd.py --model Qwen/Qwen2.5-0.5B-Instruct --teacher_model Qwen/Qwen2.5-7B-Instruct \
        --dataset prompts.jsonl --output_dir out --top_k 25 --draft_length 5 --max_new_tokens 256

Rows have a `prompt` (text or messages), and a `completion` if `rollout_mix` has a share of the source "dataset".
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config

from hf_distill import SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.callbacks import RolloutSamplesCallback


@dataclass
class Arguments:
    model: str
    teacher_model: str
    dataset: str


def main(argv: list[str] | None = None) -> SpeculativeKDTrainer:
    arguments, args, model_config = TrlParser((Arguments, SpeculativeKDConfig, ModelConfig)).parse_args_and_config(argv)
    is_file = arguments.dataset.endswith((".json", ".jsonl"))
    dataset = load_dataset("json", data_files=arguments.dataset) if is_file else load_dataset(arguments.dataset)

    trainer = SpeculativeKDTrainer(
        model=arguments.model,
        teacher_model=arguments.teacher_model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("test"),  # prompts; evaluation generates new completions
        peft_config=get_peft_config(model_config),
    )
    trainer.add_callback(RolloutSamplesCallback(trainer, steps=50))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
