"""Drop layers of a model, recover its quality with adapters, and restore the layers stage by stage.

    python examples/prune_and_recover.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara --num_layers 6 \
        --output_dir qwen2.5-0.5b-pruned --kd_weight 1 --learning_rate 2e-4 --max_steps 500

The whole model is the teacher. `A`, `B` and `C` in the output directory are the models after each stage: with the kept
layers, with half of the removed layers restored, and with all of them restored. Stop at the first that is good enough.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from hf_distill import KDConfig, KDTrainer, drop_layers, evaluate_fidelity, restore_layers
from hf_distill.pruning import original_layers, rank_layers


@dataclass
class Arguments:
    model: str
    dataset: str
    num_layers: int
    probe_rows: int = 256
    lora_targets: list[str] = field(default_factory=lambda: "q_proj k_proj v_proj o_proj up_proj down_proj".split())


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments, args = TrlParser((Arguments, KDConfig)).parse_args_and_config(argv)
    is_file = arguments.dataset.endswith((".json", ".jsonl"))
    dataset = load_dataset("json", data_files=arguments.dataset) if is_file else load_dataset(arguments.dataset)
    rows = dataset["train"]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(args.device)

    # The consecutive layers that change their input least. The first half of them is restored first.
    probe = rows.take(min(arguments.probe_rows, len(rows)))
    layers = rank_layers(teacher, probe, tokenizer, arguments.num_layers)[0].layers
    half = (len(layers) + 1) // 2
    groups = {name: group for name, group in {"B": layers[:half], "C": layers[half:]}.items() if group}
    bundles = f"{args.output_dir}/bundles"
    student = drop_layers(teacher, layers, bundles, groups)

    fidelity = {}
    for stage in ("A", *groups):
        places = None  # all layers
        if stage != "A":
            student = restore_layers(student, bundles, [stage])
            places = [i for i, layer in enumerate(original_layers(student)) if layer in groups[stage]]
        trainer = KDTrainer(
            student,
            teacher,
            args,
            rows,
            processing_class=tokenizer,
            teacher_processing_class=tokenizer,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules=arguments.lora_targets, layers_to_transform=places
            ),
        )
        trainer.train()
        student = trainer.model.merge_and_unload()
        student.save_pretrained(f"{args.output_dir}/{stage}")
        tokenizer.save_pretrained(f"{args.output_dir}/{stage}")
        # This uses the rows of the probe. Use held-out rows if you have them.
        fidelity[stage] = evaluate_fidelity(student, teacher, probe, tokenizer, max_length=args.max_length)["kl"]
        print(f"stage {stage}: layers {original_layers(student)}, KL {fidelity[stage]:.4f} nats per token")
    return fidelity


if __name__ == "__main__":
    main()
