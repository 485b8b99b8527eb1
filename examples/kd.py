"""Distil a teacher into a student: an SFT script with one class changed.

    python examples/kd.py --model Qwen/Qwen2.5-0.5B --teacher_model Qwen/Qwen2.5-7B-Instruct \
        --dataset trl-lib/Capybara --output_dir qwen2.5-0.5b-distilled --kd_weight 1 --use_peft

Every field of KDConfig is an option. TRL's ModelConfig adds options for LoRA, quantisation and dtype. On several GPUs,
start it with `accelerate launch`.
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
    args.model_init_kwargs = {
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "revision": model_config.model_revision,
        **(args.model_init_kwargs or {}),
    }

    is_file = arguments.dataset.endswith((".json", ".jsonl"))
    dataset = load_dataset("json", data_files=arguments.dataset) if is_file else load_dataset(arguments.dataset)

    trainer = KDTrainer(
        model=arguments.model,
        teacher_model=arguments.teacher_model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("test"),
        peft_config=get_peft_config(model_config),
        quantization_config=get_quantization_config(model_config),
    )
    trainer.train()
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main()
