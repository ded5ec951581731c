"""The reference's log-probs of every pair: computed once, cached by content, verified complete."""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from srit.config import DPOConfig
from srit.data.batch_sampler import BatchSampler, rank_batches
from srit.data.batches import Pair, collate_pairs
from srit.losses import sequence_logps, token_logps
from srit.models import Decoder
from srit.runtime import distributed, shutdown
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import cut_torn_line
from srit.runtime.outcome import Stopped
from srit.runtime.progress_bar import progress_bar
from srit.training import fsdp


class ReferenceLogps:
    """Scores pairs with the frozen reference, and keeps the scores in a file.

    `hash` identifies the reference: SHA-256 over names, dtypes and bytes of all weights. Make this
    object before the model gets an adapter or is sharded.
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

        Raises InputError for a log-prob that is not finite, Stopped when asked to stop.
        """
        if self.cfg.precompute_ref_log_probs:
            self._score(sampler.items, sampler.first_epoch(), "ref_logps.jsonl")
        if held_out:
            batches = rank_batches(held_out, self.cfg.per_device_eval_batch_size)
            self._score(held_out, [batch for batch, weight in batches if weight],
                        "ref_logps_eval.jsonl")

    def _score(self, pairs: Sequence[Pair], batches: Sequence[list[int]], cache_name: str) -> None:
        """Score the pairs in `batches` (this rank's indices), and share the scores of all ranks.

        `batches` must be the micro-batches of training: matrix products round differently in other
        shapes, and only the same shapes give a margin of exactly 0, and a loss of exactly ln 2, while
        policy and reference are equal. Every batch is appended to the cache as it is scored, so a
        stopped run goes on from there. Raises Stopped when asked to stop.
        """
        cache = Path(self.cfg.output_dir) / cache_name
        own = cache.with_suffix(f".rank{distributed.rank()}.jsonl")
        known = _read_cache([cache, *cache.parent.glob(f"{cache.stem}.rank*.jsonl")])
        cut_torn_line(own)
        distributed.barrier()  # nobody appends before everybody has read
        keys = [self._key(pair) for pair in pairs]
        missing = [batch for batch in batches if any(keys[i] not in known for i in batch)]
        todo = distributed.pad_to_longest_rank(missing, [0])
        with fsdp.evaluating(self.model), open(own, "a", encoding="utf-8") as handle:
            for indices, weight in progress_bar(todo, desc="reference"):
                batch = collate_pairs([pairs[i] for i in indices]).to(self.device)
                logps = sequence_logps(token_logps(self.model, batch), batch.cu_targets)  # (2B,)
                scored = zip(indices, logps.view(-1, 2).tolist(), strict=True)
                for i, values in scored if weight else ():
                    known[keys[i]] = values
                    handle.write(_cache_line(keys[i], values))
                handle.flush()
                if distributed.any_rank(shutdown.requested()):
                    raise Stopped(f"stopped: {cache.parent} has the reference's log-probs so far; the "
                                  "same command goes on from there")
        ref_logps = torch.full((len(pairs), 2), float("nan"))
        needed = [i for batch in batches for i in batch]
        ref_logps[needed] = torch.tensor([known[keys[i]] for i in needed]).view(-1, 2)
        ref_logps = _merge_ranks(ref_logps.to(self.device)).cpu()
        if distributed.rank() == 0 and todo:
            with atomic_write(cache) as handle:
                for key, values in zip(keys, ref_logps.tolist(), strict=True):
                    if values[0] == values[0]:
                        handle.write(_cache_line(key, values))
        distributed.barrier()
        own.unlink()
        if bad := [pairs[i].id for i in sorted(needed) if not ref_logps[i].isfinite().all()]:
            raise InputError(f"the reference's log-prob is not finite for {', '.join(bad[:8])}")
        for pair, values in zip(pairs, ref_logps.tolist(), strict=True):
            if values[0] == values[0]:  # NaN: no rank has this pair
                pair.ref_logps = (values[0], values[1])

    def _key(self, pair: Pair) -> str:
        """SHA-256 of what the two numbers depend on: reference, tokens and masks of both sides."""
        digest = hashlib.sha256(self.hash.encode())
        for side in (pair.chosen, pair.rejected):
            digest.update(struct.pack(f"<q{len(side.ids)}q", len(side.ids), *side.ids))
            digest.update(bytes(side.mask))
        return digest.hexdigest()


def _cache_line(key: str, logps: list[float]) -> str:
    """A line of the cache, with a checksum over what it says."""
    check = hashlib.sha256(f"{key} {logps}".encode()).hexdigest()[:16]
    return json.dumps({"key": key, "logps": logps, "check": check}) + "\n"


def _read_cache(files: Iterable[Path]) -> dict[str, list[float]]:
    """{key: log-probs} of the lines that are as they were written; the others are scored again."""
    known, damaged = {}, 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for line in text.splitlines(keepends=True):
            try:
                row = json.loads(line)
                intact = _cache_line(row["key"], row["logps"]) == line
            except (ValueError, TypeError, KeyError):
                intact = False
            if intact:
                known[row["key"]] = row["logps"]
            damaged += not intact
    if damaged and distributed.rank() == 0:
        print(f"{damaged} damaged lines of the reference's cache are scored again", flush=True)
    return known


def _merge_ranks(values: Tensor) -> Tensor:
    """The values that any rank has, NaN where none has; ranks that share a pair agree on it."""
    have = torch.isfinite(values)
    total = distributed.all_reduce_sum(torch.where(have, values, 0.0))
    count = distributed.all_reduce_sum(have.to(torch.float32))
    return torch.where(count > 0, total / count, float("nan"))
