"""From a model and a packed batch to log-probabilities and losses."""

from torch import Tensor

from srit.data.batches import Batch
from srit.kernels import linear_dpo, linear_logp, linear_nll, segment_sum
from srit.kernels.preference_loss import dpo_loss
from srit.models import Decoder

__all__ = ["dpo_loss", "linear_dpo", "linear_nll", "sequence_logps", "token_logps"]


def token_logps(model: Decoder, batch: Batch) -> Tensor:
    """log π(y_t | y_<t, x) of every trained token, (M,) float32.

    Through the same GEMMs as the losses: a reference scored with it equals the policy to the bit
    while their weights are equal.
    """
    return linear_logp(batch.trained_hidden(model), model.head_weight, batch.targets, path="gemm")


def sequence_logps(logps: Tensor, cu_targets: Tensor) -> Tensor:
    """Sums over each sequence's trained tokens: (M,) and (S + 1,) -> (S,).

    log π(y|x) = Σ_t log π(y_t | y_<t, x): a sum, not a mean; DPO compares whole answers.
    """
    return segment_sum(logps, cu_targets)
