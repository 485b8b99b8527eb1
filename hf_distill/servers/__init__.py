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
    """The scores of one text, after each of its first T - 1 tokens or the last n of them."""

    ids: np.ndarray  # (n, K) int32, the most likely token first; -1 for no entry
    log_probs: np.ndarray  # (n, K) float32, in nats at temperature 1; -inf for no entry
    own: np.ndarray  # (n,) float32, the log-probability of the text's own next token


def within(scores: Scores, vocab_size: int) -> Scores:
    """The scores without tokens from `vocab_size` on: a padded head has them, and their probability joins the tail."""
    ids, log_probs = scores.ids, scores.log_probs
    is_known = (ids >= 0) & (ids < vocab_size)
    width = min(ids.shape[1], vocab_size)
    if is_known.all():
        return scores._replace(ids=ids[:, :width], log_probs=log_probs[:, :width])
    order = np.argsort(~is_known, axis=1, kind="stable")[:, :width]  # known ones first, in their order
    is_known, ids, log_probs = (np.take_along_axis(side, order, 1) for side in (is_known, ids, log_probs))
    return scores._replace(ids=np.where(is_known, ids, -1), log_probs=np.where(is_known, log_probs, -np.inf))
