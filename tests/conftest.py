"""Tiny models with the structure of real ones, and a tokenizer, made in memory: no test needs a network or a file."""

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

disable_progress_bars()
torch.set_num_threads(1)

SENTENCES = [
    "The small dog ran to the river and saw a fish.",
    "Tom gave his sister three red apples and she smiled.",
    "It was raining, so the children played inside the house all day.",
    "A bird sat on the fence and sang until the sun went down.",
    "My grandmother bakes bread every Sunday morning before church.",
    "The train to the city leaves at nine, and we must not be late.",
    "He looked for his keys everywhere but they were in his pocket.",
    "When winter came the pond froze and everyone went skating.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(vocab_size: int = 384, added_tokens: tuple[str, ...] = (), corpus=SENTENCES):
    """A byte-level BPE tokenizer with `<eos>`, a pad token of its own and a chat template with generation markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.add_tokens(list(added_tokens))
    fast.chat_template = CHAT_TEMPLATE
    return fast


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

# One configuration per way in which real families differ: grouped-query attention, tied and untied heads, biases,
# sliding windows, logit scales, soft-caps, key norms, learned positions.
FAMILIES = {
    "llama": lambda **kw: LlamaConfig(**{**_SIZES, "tie_word_embeddings": False, **kw}),
    "qwen2": lambda **kw: Qwen2Config(**{**_SIZES, "tie_word_embeddings": True, **kw}),
    "qwen3": lambda **kw: Qwen3Config(**{**_SIZES, "head_dim": 8, **kw}),
    "mistral": lambda **kw: MistralConfig(**{**_SIZES, "sliding_window": 8, **kw}),
    "gemma2": lambda **kw: Gemma2Config(
        **{**_SIZES, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0, **kw}
    ),
    "gemma3_text": lambda **kw: Gemma3TextConfig(
        **{**_SIZES, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], **kw}
    ),
    "gpt2": lambda **kw: GPT2Config(
        **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        | {"attn_pdrop": 0.0, **kw}
    ),
    "cohere": lambda **kw: CohereConfig(**{**_SIZES, "logit_scale": 0.25, **kw}),
    "granite": lambda **kw: GraniteConfig(**{**_SIZES, "logits_scaling": 4.0, **kw}),
    "phi": lambda **kw: PhiConfig(**{**_SIZES, "num_key_value_heads": 4, **kw}),
    "phi3": lambda **kw: Phi3Config(**{**_SIZES, **kw}),
}


def make_model(family: str = "llama", vocab_size: int = 384, seed: int = 0, **config):
    """A random float32 causal language model of a family, with logits far enough from uniform to tell errors."""
    torch.manual_seed(seed)
    settings = FAMILIES[family](vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=1, **config)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def leave_imports_to_themselves() -> None:
    """Leaves all that was imported out of later garbage collections: each training runs one, of half a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session):
    leave_imports_to_themselves()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A student and a teacher on disk, and rows for them: texts, and questions with answers or knowledge."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    Dataset.from_dict({"text": SENTENCES}).to_json(folder / "rows.jsonl")
    facts = [
        {"question": f"Which is sentence {i}?", "answer": text, "query": f"Where is {i}?", "knowledge": text}
        for i, text in enumerate(SENTENCES)
    ]
    Dataset.from_list(facts).to_json(folder / "facts.jsonl")
    return folder


@pytest.fixture(autouse=True)
def pictures_are_not_drawn(request, monkeypatch):
    """Writes pictures as their first bytes: to draw one takes as long as a short run. `draws` marks tests that draw."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b"\x89PNG"))


@pytest.fixture
def inputs():
    """A batch of 12 and of 7 tokens, padded to (2, 12)."""
    torch.manual_seed(0)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": torch.randint(2, 384, (2, 12)), "attention_mask": mask}


@pytest.fixture
def text_dataset():
    return Dataset.from_dict({"text": SENTENCES * 2})


@pytest.fixture
def prompt_dataset():
    rows = [sentence.split(" ", 4) for sentence in SENTENCES * 2]
    return Dataset.from_dict({"prompt": [" ".join(r[:4]) for r in rows], "completion": [" " + r[4] for r in rows]})


@pytest.fixture
def messages_dataset():
    turns = [
        [{"role": "user", "content": " ".join(words[:3])}, {"role": "assistant", "content": " ".join(words[3:])}]
        for words in (sentence.split() for sentence in SENTENCES * 2)
    ]
    return Dataset.from_dict({"messages": turns})


def pytest_terminal_summary(terminalreporter):
    """The table of the sweep over families, whichever process each of them was tried in."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    found = [value for report in reports for name, value in report.user_properties if name == "outcomes of a family"]
    if found:
        from tests.test_families import counts

        terminalreporter.section("causal families of transformers")
        terminalreporter.write_line(counts(dict(found)))
