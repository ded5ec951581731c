"""Reference log-probabilities: computed once, cached by content, verified complete."""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from srit.data.batches import Batch, collate
from srit.data.examples import Pair
from srit.losses import sequence_logps, token_logps
from srit.models import Decoder
from srit.runtime import distributed
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import read_jsonl
from srit.training import parallel


def model_hash(model: Decoder) -> str:
    """SHA-256 over names, dtypes and bytes of all weights."""
    digest = hashlib.sha256(str(model.compute_dtype).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pair_key(reference: str, pair: Pair) -> str:
    """What the two numbers depend on: the reference's weights, and tokens and mask of both sides."""
    digest = hashlib.sha256(reference.encode())
    for side in (pair.chosen, pair.rejected):
        digest.update(struct.pack(f"<q{len(side.ids)}q", len(side.ids), *side.ids))
        digest.update(bytes(side.mask))
    return digest.hexdigest()


def collate_pairs(pairs: Sequence[Pair]) -> Batch:
    """One stream: sequence 2i is chosen i, 2i + 1 rejected i, and the two share their beginning."""
    return collate([(pair.chosen, pair.rejected) for pair in pairs])


@torch.no_grad()
def pair_logps(model: Decoder, batch: Batch) -> Tensor:
    """(2B,) completion log-probs of B pairs, chosen and rejected alternating."""
    return sequence_logps(token_logps(model, batch), batch.cu_targets)


def reference_logps(model: Decoder, pairs: Sequence[Pair], micro_batches: Iterable[list[int]],
                    reference: str, cache: Path, device: torch.device) -> Tensor:
    """(P, 2) reference log-probs of all pairs that `micro_batches` name, on the CPU; others are NaN.

    `micro_batches` must be the ones that training will use first: matrix products round differently
    in differently shaped batches, and only the same shape gives a margin of exactly 0, and a loss
    of exactly ln 2, while policy and reference are the same. What the cache file holds already is
    not computed again. Raises InputError if a pair is left without its value.
    """
    result = torch.full((len(pairs), 2), float("nan"), dtype=torch.float32)
    known = {}
    if cache.is_file():
        known = {row["key"]: row["logps"] for row in read_jsonl(cache)}
    keys = [pair_key(reference, pair) for pair in pairs]
    wanted = [rows for rows in micro_batches if rows]
    missing = [rows for rows in wanted if any(keys[i] not in known for i in rows)]
    model.eval()
    own, computed = distributed.pad_to_longest_rank(missing, [0]), []
    for rows, weight in tqdm(own, desc="reference", disable=distributed.rank() != 0, dynamic_ncols=True):
        batch = collate_pairs([pairs[i] for i in rows]).to(device)
        values = pair_logps(model, batch).view(-1, 2)
        if weight:  # else only to keep step with the other ranks
            computed.append((rows, values))
    for rows, values in computed:  # only now: reading one waits for the device
        known |= {keys[i]: logps for i, logps in zip(rows, values.tolist(), strict=True)}
    model.train()
    parallel.reshard(model)
    for rows in wanted:
        for i in rows:
            result[i] = torch.tensor(known[keys[i]])
    result = _gather(result.to(device)).cpu()
    if distributed.rank() == 0 and own:
        with atomic_write(cache) as handle:
            for key, logps in zip(keys, result.tolist(), strict=True):
                if logps[0] == logps[0]:
                    handle.write(json.dumps({"key": key, "logps": logps}) + "\n")
    needed = sorted({i for rows in wanted for i in rows})
    if not torch.isfinite(result[needed]).all():
        bad = [pairs[i].id for i in needed if not torch.isfinite(result[i]).all()]
        raise InputError(f"the reference's log-prob is not finite for {', '.join(bad[:8])}")
    return result


def _gather(values: Tensor) -> Tensor:
    """Values that some rank has, NaN where none has; ranks never disagree on a pair."""
    have = torch.isfinite(values)
    total = distributed.all_reduce_sum(torch.where(have, values, 0.0))
    count = distributed.all_reduce_sum(have.to(torch.float32))
    return torch.where(count > 0, total / count, float("nan"))
