import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REPOSITORY = "https://github.com/hf-distill/hf_distill"


def version() -> str:
    """`hf_distill.__version__`, without importing what the package imports."""
    (found,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "hf_distill" / "__init__.py").read_text(), re.MULTILINE)
    return found


def long_description() -> str:
    """README.md for a package index, where a link to a file of the repository needs its address."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.sub(r"\]\((?!https?:|#)", f"]({REPOSITORY}/blob/main/", readme)
    return re.sub(r"/blob/main/([\w/.]+\.png)", r"/raw/main/\1", linked)  # the picture, not its page


# `make test-oldest` takes the lower bounds, `make test-newest` the newest there are, `make test` constraints.txt.
REQUIREMENTS = [
    "torch>=2.9",
    "transformers>=5.17,<6",
    "trl>=1.16,<2",  # SFTTrainer of 1.15 fails on CPU builds of torch
    "peft>=0.21",
    "accelerate>=1.15",  # older ones resume LoRA under FSDP2 with one process's part of the adapters alone
    "datasets>=4.8",  # 4.7 fails on JSON lines of which some lack a column
    "safetensors>=0.8",
    "httpx2>=2",  # under newer huggingface_hub, too
    "tenacity>=9",
    "rich>=13",
    "matplotlib>=3.9",  # 3.8 asks for NumPy 1, which datasets' pyarrow refuses
    "pyyaml>=6.0.1",  # TRL asks for it
]

QUANTIZATION = ["bitsandbytes>=0.49"]
DEEPSPEED = ["deepspeed>=0.19.8"]  # of older ones, some load a split teacher with weights that are not its own
LM_EVAL = ["lm_eval>=0.4.13"]  # tasks of lm-evaluation-harness in `hf-distill evaluate`

EXTRAS = {
    "quantization": QUANTIZATION,
    "deepspeed": DEEPSPEED,
    "trackers": ["wandb", "trackio", "tensorboard"],
    "eval": ["evaluate>=0.4.6", "rouge_score", "sacrebleu"],
    "vision": ["torchvision", "num2words"],  # processors of Qwen-VL and InternVL, and of SmolVLM
    "lm-eval": LM_EVAL,
    "benchmarks": ["liger-kernel>=0.8.2"],
    # The 4-bit tests and those of ZeRO run on CPU.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.8",
        "setuptools>=64",  # the tests build the package
        "tensorboard",
        "evaluate>=0.4.6",
        "num2words",  # SmolVLM's processor
        "nbclient>=0.10",  # the notebooks of the examples are run
        "ipykernel>=6.29",
        "ipywidgets>=8.1",  # what progress bars are made of there
        *QUANTIZATION,
        *DEEPSPEED,
        *LM_EVAL,
    ],
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
    version=version(),
    description="Distillation of causal language models on transformers and TRL",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{REPOSITORY}/blob/main/docs/index.md",
        "Source": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["hf_distill", "hf_distill.*"]),
    # The demo ships its teacher: weights, config, tokenizer and chat template; reports their frame, style and scripts;
    # the command line its table of options.
    package_data={
        "hf_distill": ["py.typed", "demo/teacher/**/*", "page/*.html", "page/*.css", "page/*.js", "cli/*.json"]
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-distill = hf_distill.cli:main"]},
)
