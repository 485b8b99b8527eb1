"""The hard-label loss: the loop without a signal. No teacher is asked, and no logits of all positions exist.

Shapes: N label-bearing positions, D hidden width, V vocabulary.
"""

from torch import Tensor

from hf_distill.losses.head import Head
from hf_distill.losses.loop import chunked_loss
from hf_distill.losses.objective import DistillationLoss, Objective


def hard_label_loss(hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
    """`ce_weight * sum_i CE(i) / num_items`, at temperature 1, without [N x V] logits.

    Args:
        hidden (`torch.Tensor` of shape `(N, D)`):
            Last hidden states, after the final norm. They get a gradient if they require one.
        head (`Head`): with a weight (V, D). A frozen one costs no gradient.
        labels (`torch.Tensor` of shape `(N,)`, int64): the token that follows each position; -100 for none.
        objective (`Objective`):
            Of its settings, those of the divergence play no part. With `ce_weight=None` the weight is `1 - kd_weight`.

    Returns:
        [`DistillationLoss`] in nats. There is no teacher: `kd`, `agreement` and `num_paired` are 0.

    Raises:
        `ValueError`: shapes that do not fit, or a label that is no token.
    """
    return chunked_loss(hidden, head, labels, objective, [])
