from pathlib import Path

from setuptools import find_packages, setup


def long_description() -> str:
    readme = Path(__file__).parent / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


# The tested versions of all of these are pinned in constraints.txt.
REQUIREMENTS = [
    "torch>=2.9",
    "transformers>=5.23,<6",
    "trl>=1.15,<2",  # SFTTrainer's internals were rewritten in 1.15
    "peft>=0.20",
    "accelerate>=1.12",
    "datasets>=4.7",
    "safetensors>=0.8",
    "rich>=13",
    "matplotlib>=3.8",
    "pyyaml>=6.0",
]

QUANTIZATION = ["bitsandbytes>=0.49"]
DEEPSPEED = ["deepspeed>=0.18.6"]

EXTRAS = {
    "quantization": QUANTIZATION,
    "deepspeed": DEEPSPEED,
    "trackers": ["wandb", "trackio", "tensorboard"],
    "eval": ["evaluate>=0.4.6", "rouge_score", "sacrebleu"],
    "benchmarks": ["liger-kernel>=0.8.2"],
    # The 4-bit tests and those of ZeRO run on CPU.
    "test": ["pytest>=8", "pytest-xdist>=3.5", "tensorboard", "evaluate>=0.4.6", *QUANTIZATION, *DEEPSPEED],
    "lint": [
        "ruff",
        "codespell",
        "import-linter",
        "pyright[nodejs]",  # brings its own Node.js: nothing is downloaded when it runs
        "pre-commit",
        "pre-commit-hooks",
    ],
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
}

setup(
    name="hf_distill",
    version="0.1.0",
    description="Distillation of causal language models on transformers and TRL",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hf_distill", "hf_distill.*"]),
    # The demo ships its teacher: weights, config, tokenizer and chat template.
    package_data={"hf_distill": ["demo/teacher/**/*"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-distill = hf_distill.cli:main"]},
)
