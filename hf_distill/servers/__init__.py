"""Language models behind an address: what they are asked over HTTP, and what they say about token ids.

[`~hf_distill.servers.client`] asks, [`~hf_distill.servers.dialects`] knows the words of vLLM and SGLang, and
[`~hf_distill.servers.handshake`] finds out what a server can do. All of it is numbers and JSON: no model, no tensor.

Shapes: T tokens of a text, K entries at a position.
"""

from typing import NamedTuple

import numpy as np


class TeacherAway(ConnectionError):
    """A teacher does not answer, or not with what it was asked for.

    A teacher raises it in `collate`. The run then writes a checkpoint of its last finished update, in all processes,
    and stops with this message.
    """


class WrongAnswer(ValueError):
    """An answer that is no answer to the question: it must never become a loss."""


class Scores(NamedTuple):
    """What a server says about the tokens of one text, after each of its first T - 1 tokens or the last n of them."""

    ids: np.ndarray  # (n, K) int32, the most likely token first; -1 for no entry
    log_probs: np.ndarray  # (n, K) float32, in nats at temperature 1; -inf for no entry
    own: np.ndarray  # (n,) float32, the log-probability of the text's own next token
