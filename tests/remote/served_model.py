"""What a stub server knows of its model: log-probabilities of given ids, and ids that it generates.

All numbers are those of transformers in float32. Rows are computed one by one, so that a request of many rows has the
bits of many requests of one row.
"""

import hashlib
import itertools
import threading
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PART = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for a part of a character


@dataclass
class Sampling:
    """How to generate: the settings that vLLM and SGLang have in common."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0 and below: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    allowed_ids: tuple[int, ...] | None = None
    bias: dict[int, float] = field(default_factory=dict)


@dataclass
class Generated:
    """Generated ids, the raw log-probabilities at their positions (M, V), and the id that stopped the generation."""

    ids: list[int]
    log_probs: torch.Tensor
    stopped_by: int | None = None


class ServedModel:
    """A causal language model as a server holds it.

    Args:
        model: a transformers model in float32.
        tokenizer: decodes single ids; without one a token is written `<id>`.
        name: the name under which the model is served.
        max_model_len: the most tokens of prompt and completion together; by default the model's positions.
        version: what the server says of its version.
    """

    def __init__(self, model, tokenizer=None, *, name="t", max_model_len=None, version="0.32.0"):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.max_model_len = max_model_len or model.config.max_position_embeddings
        self.version = version
        self.vocab_size = model.config.vocab_size
        eos = model.config.eos_token_id
        self.eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        self._lock = threading.Lock()
        self._unseeded = itertools.count()
        self._texts: dict[int, str] = {}

    @classmethod
    def load(cls, folder, **settings):
        """The model and, where there is one, the tokenizer of a folder."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError):
            tokenizer = None
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, **settings)

    def text(self, ids) -> str:
        if self.tokenizer is None:
            return "".join(f"<{id}>" for id in ids)
        return self.tokenizer.decode(list(ids))

    def decoded(self, id: int, before: list[int]) -> str:
        """The text of one token; of a part of a character only what it completes after the tokens before it."""
        text = self._text(id)
        if not text.endswith(PART):
            return text
        if not self._text(before[-1]).endswith(PART):
            return ""  # nothing waits to be completed
        for start in range(1, 5):
            context = before[-start:]
            text = self.text([*context, id])
            if not text.endswith(PART):
                return text.removeprefix(self.text(context).rstrip(PART))
        return ""

    def _text(self, id: int) -> str:
        if id not in self._texts:
            self._texts[id] = self.text([id])
        return self._texts[id]

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities `(N, V)` of the token after each of N ids, in float32."""
        with self._lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            return logits.float().log_softmax(dim=-1)

    def generate(self, prompt: list[int], how: Sampling) -> Generated:
        """Tokens after a prompt: a function of prompt, settings and seed; without a seed other ones for each call."""
        seed = f"unseeded {next(self._unseeded)}" if how.seed is None else how.seed
        digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        stops = (*how.stop_ids, *(() if how.ignore_eos else self.eos_ids))
        found = Generated([], torch.empty(0, self.vocab_size))
        rows = []
        while len(found.ids) < how.max_tokens and len(prompt) + len(found.ids) < self.max_model_len:
            rows.append(self.log_probs([*prompt, *found.ids])[-1])  # (V,)
            found.ids.append(_draw(rows[-1], how, generator))
            if found.ids[-1] in stops:
                found.stopped_by = found.ids[-1]
                break
        if rows:
            found.log_probs = torch.stack(rows)  # (M, V)
        return found


def _draw(log_probs: torch.Tensor, how: Sampling, generator: torch.Generator) -> int:
    """One id by the settings; ties go to the lower id."""
    scores = log_probs.double()
    if how.allowed_ids is not None:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[list(how.allowed_ids)] = 0.0
        scores = scores + allowed
    for id, bias in how.bias.items():
        scores[id] += bias
    if how.temperature == 0:
        return int(scores.argmax())
    probs = (scores / how.temperature).softmax(-1)
    probs[probs < how.min_p * probs.max()] = 0.0
    order = probs.argsort(descending=True, stable=True)
    if how.top_k > 0:
        probs[order[how.top_k :]] = 0.0
    before = probs[order].cumsum(0) / probs.sum() - probs[order] / probs.sum()
    probs[order[before >= how.top_p]] = 0.0
    return int(torch.multinomial(probs / probs.sum(), 1, generator=generator))
