"""Operations of the language-model head; `dispatch` chooses between Triton kernel and PyTorch twin.

  dpo_loss      sequence log-probs of pairs -> losses and rewards; the formula, plain PyTorch
  linear_logp   hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,)
  linear_nll    the same -> negative sum of the log-probs, gradients made in the forward
  linear_dpo    the same, for pairs -> preference loss and rewards, gradients made in the forward
  pair_head     token log-probs of pairs -> losses, rewards, sums and slopes
  segment_sum   sums of consecutive segments, in a fixed order

Attention of decoding rows over a paged KV cache is in `paged_attention`.
"""

from srit.kernels.fused_linear_loss import linear_dpo, linear_nll
from srit.kernels.linear_logp import linear_logp
from srit.kernels.pair_head import pair_head, segment_sum
from srit.kernels.preference_loss import dpo_loss

__all__ = ["dpo_loss", "linear_dpo", "linear_logp", "linear_nll", "pair_head", "segment_sum"]
