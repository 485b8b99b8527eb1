"""Speculative writing by its rule alone: no cache, no padding, every text read from its beginning."""

import math
from typing import NamedTuple

import numpy as np
import torch

# Decisions closer than this may fall differently in float32; rows with one are not compared.
NARROW = 1e-5


class OracleRow(NamedTuple):
    tokens: list[int]
    is_draft: list[bool]
    blocks: list[tuple[int, int, int, int]]  # the block's draft length, drafted, accepted, corrected
    margin: float  # of the narrowest decision


class Oracle:
    """Keeps the logits it has computed: they are a function of model and text."""

    def __init__(self, student, teacher, vocab_size):
        self.models = {"student": student, "teacher": teacher}
        self.vocab_size = vocab_size
        self.known = {}
        self.margin = np.inf

    def logits(self, side, text):
        """What predicts the token after `text`, float64 (V,)."""
        key = side, tuple(text)
        if key not in self.known:
            with torch.no_grad():
                logits = self.models[side](input_ids=torch.tensor([text])).logits[0].double().numpy()
            for end in range(1, len(text) + 1):
                self.known.setdefault((side, tuple(text[:end])), logits[end - 1, : self.vocab_size])
        return self.known[key]

    def note(self, margin):
        self.margin = min(self.margin, float(margin))

    def draw(self, logits, uniform, temperature, top_p):
        if temperature == 0:
            first, second = np.sort(logits)[::-1][:2]
            self.note(first - second)
            return int(logits.argmax())
        probs = softmax(logits / temperature)
        if top_p < 1:
            order = np.argsort(-probs, kind="stable")
            mass = probs[order].cumsum()
            self.note(np.abs(mass - top_p).min())
            nucleus = order[: int((mass < top_p).sum()) + 1]
            probs = np.where(np.isin(np.arange(len(probs)), nucleus), probs, 0.0)
        edges = probs.cumsum() / probs.sum()
        self.note(np.abs(edges[:-1] - uniform).min())
        return int((edges <= uniform).sum())

    def accepts(self, logits, token, config):
        best = torch.topk(torch.from_numpy(logits), config.top_k).indices.tolist()
        if config.top_k < len(logits):
            ordered = np.sort(logits)[::-1]
            # The best logit that is out for a token that is in, and the other way round.
            self.note(abs(logits[token] - ordered[config.top_k - (token not in best)]))
        prob = softmax(logits / (config.teacher_temperature or 1.0))[token]
        if config.min_prob > 0:
            self.note(abs(prob - config.min_prob))
        return token in best and prob >= config.min_prob

    def write(self, sides, noise, config, eos):
        """Rows of (student's prompt, teacher's prompt); `noise` is (rows, max_new_tokens, 2)."""
        rows = [self.row(*prompts, noise[i], config, eos) for i, prompts in enumerate(sides)]
        asked, found = {i: next(row) for i, row in enumerate(rows)}, {}
        while asked:
            length = math.ceil(sum(asked.values()) / len(asked))
            for i in list(asked):
                try:
                    asked[i] = rows[i].send(length)
                except StopIteration as end:
                    del asked[i]
                    found[i] = end.value
        return [found[i] for i in range(len(rows))]

    def row(self, student_prompt, teacher_prompt, noise, config, eos):
        """One row: yields the draft length that it asks for, and is sent that of the block."""
        tokens, is_draft, blocks = [], [], []
        length, margin = config.draft_length, np.inf
        while len(tokens) < config.max_new_tokens and not (tokens and tokens[-1] in eos):
            length = yield length
            self.margin, draft = margin, []
            while len(draft) < length and len(tokens) + len(draft) < config.max_new_tokens:
                place = len(tokens) + len(draft)
                logits = self.logits("student", student_prompt + tokens + draft)
                draft.append(self.draw(logits, noise[place, 0], config.student_temperature, config.student_top_p))
                if draft[-1] in eos:
                    break
            if draft:
                self.logits("teacher", teacher_prompt + tokens + draft)  # makes all of them known at once
            accepted = 0
            while accepted < len(draft):
                logits = self.logits("teacher", teacher_prompt + tokens + draft[:accepted])
                if not self.accepts(logits, draft[accepted], config):
                    break
                accepted += 1
            tokens, is_draft = tokens + draft[:accepted], is_draft + [True] * accepted
            corrected = not draft or accepted < len(draft)
            if corrected:
                logits = self.logits("teacher", teacher_prompt + tokens)
                uniform = noise[len(tokens), 1]
                tokens.append(self.draw(logits, uniform, config.teacher_temperature, config.teacher_top_p))
                is_draft.append(False)
            blocks.append((length, len(draft), accepted, int(corrected)))
            if config.adaptive and config.draft_length:
                length = max(1, accepted + 1) if corrected else min(config.draft_length, length + 2)
            margin = self.margin
        return OracleRow(tokens, is_draft, blocks, margin)


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()
