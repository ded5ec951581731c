"""From a model and a packed batch to log-probabilities and losses."""

from torch import Tensor

from srit.data import Batch
from srit.kernels import dpo_head, dpo_loss, linear_logp, segment_sum
from srit.models import Decoder

__all__ = ["chosen_nll", "dpo_head", "dpo_loss", "sequence_logps", "token_logps"]


def token_logps(model: Decoder, batch: Batch) -> Tensor:
    """log π(y_t | y_<t, x) of every trained token, (M,) float32.

    Only positions that predict a trained token reach the head; SFT, DPO and its reference, and
    evaluation all score through this one function.
    """
    hidden = model.hidden(batch.input_ids, positions=batch.positions, cu_seqlens=batch.cu_seqlens)
    return linear_logp(hidden[0, batch.rows], model.head_weight, batch.targets)


def sequence_logps(logps: Tensor, cu_targets: Tensor) -> Tensor:
    """Sums over each sequence's trained tokens: (M,) and (S + 1,) -> (S,).

    log π(y|x) = Σ_t log π(y_t | y_<t, x): a sum, not a mean; DPO compares whole answers.
    """
    return segment_sum(logps, cu_targets)


def chosen_nll(logps: Tensor, cu_targets: Tensor) -> Tensor:
    """−log π(y_w|x) / |y_w| of every pair, (B,): the term that keeps log π(y_w) from falling.

    Source: Iterative RPO (arXiv 2404.19733, eq. 1), which normalises by the answer's own length.
    """
    lengths = cu_targets.diff()[0::2]
    return -sequence_logps(logps, cu_targets)[0::2] / lengths
