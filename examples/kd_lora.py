"""Distil into LoRA adapters: describe them, train them, describe their updates, merge them into one model.

    python examples/kd_lora.py --model Qwen/Qwen2.5-1.5B --teacher_model Qwen/Qwen2.5-7B-Instruct \
        --dataset trl-lib/Capybara --output_dir out/kd_lora --kd_weight 1 --learning_rate 2e-4 \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 32 --teacher_quantization 4bit

Every field of KDConfig and of TRL's ModelConfig is an option: `--lora_r 16`, `--load_in_4bit` for a QLoRA student,
`--teacher_device cuda:1` for a teacher on a second GPU.
"""

from dataclasses import dataclass

import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hf_distill import KDConfig, KDTrainer
from hf_distill.lora import describe_lora, describe_updates, merge_adapter


@dataclass
class Arguments:
    model: str
    teacher_model: str
    dataset: str


def main(argv: list[str] | None = None) -> KDTrainer:
    parser = TrlParser((Arguments, KDConfig, ModelConfig))
    parser.set_defaults(
        use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0, lora_target_modules=["all-linear"], dtype="auto"
    )
    arguments, args, model_config = parser.parse_args_and_config(argv)
    peft_config = get_peft_config(model_config)

    # Shapes are enough to describe the trained parameters, so no weights are loaded.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model))
    print(describe_lora(model, peft_config))

    is_file = arguments.dataset.endswith((".json", ".jsonl"))
    dataset = load_dataset("json", data_files=arguments.dataset) if is_file else load_dataset(arguments.dataset)
    args.model_init_kwargs = {"dtype": model_config.dtype, **(args.model_init_kwargs or {})}
    trainer = KDTrainer(
        model=arguments.model,
        teacher_model=arguments.teacher_model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("test"),
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_config),
    )
    trainer.train()
    trainer.save_model()

    print(describe_updates(trainer.model))
    # The adapter is merged into the weights as they were saved, even if it was trained over 4-bit weights.
    merge_adapter(args.output_dir, f"{args.output_dir}/merged")
    return trainer


if __name__ == "__main__":
    main()
