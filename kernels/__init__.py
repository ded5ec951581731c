"""Operations with a Triton kernel and a PyTorch twin each; `dispatch` chooses between the two.

  linear_logp   (N, D) hidden, (V, D) weight, (N,) targets -> (N,) log-probabilities
  linear_nll    the same -> their negative sum, gradients in the same pass
  linear_dpo    the same, for pairs -> preference loss and rewards, gradients in the same pass
  pair_head      token log-probabilities of pairs -> losses, rewards, sums and slopes
  dpo_loss      sequence log-probabilities of pairs -> losses and rewards (the formula)
  segment_sum   sums of consecutive segments, in a fixed order

and paged_attention_triton, whose twin is in models/paged.py: a decoding step's attention.
"""

from srit.kernels.fused_linear_loss import linear_dpo, linear_nll
from srit.kernels.linear_logp import linear_logp
from srit.kernels.pair_head import dpo_loss, pair_head, segment_sum

__all__ = ["pair_head", "dpo_loss", "linear_dpo", "linear_logp", "linear_nll", "segment_sum"]
