"""The reference's log-probs of every pair: computed once, cached by content, verified complete."""

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from srit.config import DPOConfig
from srit.data.batch_sampler import BatchSampler, rank_batches
from srit.data.batches import Pair, collate_pairs
from srit.losses import sequence_logps, token_logps
from srit.models import Decoder
from srit.runtime import distributed
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import read_jsonl
from srit.training import fsdp


class ReferenceLogps:
    """Scores pairs with the frozen reference, and keeps the scores in a file.

    `hash` identifies the reference: SHA-256 over names, dtypes and bytes of all weights. Make this
    object while the model still is the reference, before it gets an adapter or is sharded.
    """

    def __init__(self, model: Decoder, cfg: DPOConfig, device: torch.device) -> None:
        self.model, self.cfg, self.device = model, cfg, device
        digest = hashlib.sha256(str(model.compute_dtype).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self.hash = digest.hexdigest()

    def score(self, sampler: BatchSampler[Pair], held_out: Sequence[Pair]) -> None:
        """Set `ref_logps` of the held-out pairs and, with precompute_ref_log_probs, the training pairs.

        Raises InputError for a log-prob that is not finite.
        """
        if self.cfg.precompute_ref_log_probs:
            self._score(sampler.items, sampler.first_epoch(), "ref_logps.jsonl")
        if held_out:
            batches = rank_batches(held_out, self.cfg.per_device_eval_batch_size)
            self._score(held_out, [batch for batch, weight in batches if weight],
                        "ref_logps_eval.jsonl")

    def _score(self, pairs: Sequence[Pair], batches: Sequence[list[int]], cache_name: str) -> None:
        """Set `ref_logps` of every pair that `batches`, indices of this rank's pairs, name on any rank.

        `batches` must be the micro-batches of training: matrix products round differently in other
        shapes, and only the same shapes give a margin of exactly 0, and a loss of exactly ln 2, while
        policy and reference are equal. What the cache file holds is not computed again.
        """
        cache, known = Path(self.cfg.output_dir) / cache_name, {}
        if cache.is_file():
            known = {row["key"]: row["logps"] for row in read_jsonl(cache)}
        keys = [self._key(pair) for pair in pairs]
        missing = [batch for batch in batches if any(keys[i] not in known for i in batch)]
        todo, computed = distributed.pad_to_longest_rank(missing, [0]), []
        with fsdp.scoring(self.model):
            for indices, weight in tqdm(todo, desc="reference", disable=distributed.rank() != 0,
                                        dynamic_ncols=True):
                batch = collate_pairs([pairs[i] for i in indices]).to(self.device)
                logps = sequence_logps(token_logps(self.model, batch), batch.cu_targets)  # (2B,)
                if weight:
                    computed.append((indices, logps.view(-1, 2)))
        for indices, logps in computed:  # read last: reading waits for the device
            known |= {keys[i]: values for i, values in zip(indices, logps.tolist(), strict=True)}
        table = torch.full((len(pairs), 2), float("nan"))
        own = [i for batch in batches for i in batch]
        table[own] = torch.tensor([known[keys[i]] for i in own]).view(-1, 2)
        table = _merge_ranks(table.to(self.device)).cpu()
        if distributed.rank() == 0 and todo:
            with atomic_write(cache) as handle:
                for key, logps in zip(keys, table.tolist(), strict=True):
                    if logps[0] == logps[0]:
                        handle.write(json.dumps({"key": key, "logps": logps}) + "\n")
        if bad := [pairs[i].id for i in sorted(own) if not table[i].isfinite().all()]:
            raise InputError(f"the reference's log-prob is not finite for {', '.join(bad[:8])}")
        for pair, logps in zip(pairs, table.tolist(), strict=True):
            if logps[0] == logps[0]:  # NaN: no rank has this pair
                pair.ref_logps = (logps[0], logps[1])

    def _key(self, pair: Pair) -> str:
        """SHA-256 of what the two numbers depend on: reference, tokens and masks of both sides."""
        digest = hashlib.sha256(self.hash.encode())
        for side in (pair.chosen, pair.rejected):
            digest.update(struct.pack(f"<q{len(side.ids)}q", len(side.ids), *side.ids))
            digest.update(bytes(side.mask))
        return digest.hexdigest()


def _merge_ranks(values: Tensor) -> Tensor:
    """The values that any rank has, NaN where none has; ranks that share a pair agree on it."""
    have = torch.isfinite(values)
    total = distributed.all_reduce_sum(torch.where(have, values, 0.0))
    count = distributed.all_reduce_sum(have.to(torch.float32))
    return torch.where(count > 0, total / count, float("nan"))
