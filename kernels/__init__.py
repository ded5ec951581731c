"""Operations with a Triton kernel and a PyTorch twin each; `dispatch` chooses between the two.

  linear_logp   (N, D) hidden, (V, D) weight, (N,) targets -> (N,) log-probabilities
  dpo_head      token log-probabilities of pairs -> losses, rewards and sums
  dpo_loss      sequence log-probabilities of pairs -> losses and rewards (the formula)
  segment_sum   sums of consecutive segments, in a fixed order
"""

from srit.kernels.dpo_head import dpo_head, dpo_loss, segment_sum
from srit.kernels.linear_logp import linear_logp

__all__ = ["dpo_head", "dpo_loss", "linear_logp", "segment_sum"]
