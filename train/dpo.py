"""Phase 2, self-refine: Direct Preference Optimization on the student's own answers.

    L = − E log σ( β [log π_θ(y_w|x) − log π_inst(y_w|x)] − β [log π_θ(y_l|x) − log π_inst(y_l|x)] )
                                                             (arXiv 2405.00402, §2.2; 2305.18290 eq. 7)

π_θ starts as the instructed student π_inst, which stays the frozen reference. There is never a
second model: its log-probs are computed once, before the first step, or (LoRA) with the adapter
switched off.

In:   pairs.jsonl (or TRL rows: prompt/chosen/rejected, strings or message lists)
Out:  a model in Hugging Face layout, metrics.jsonl, run.json, checkpoint-N/

    python train/dpo.py --model_name_or_path out/sft --train_file pairs.jsonl --output_dir out/dpo
    torchrun --nproc_per_node 8 train/dpo.py --config runs/x.yaml
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from srit.config import DPOConfig
from srit.data.batch_sampler import Schedule
from srit.data.batches import Batch
from srit.data.examples import Pair, read_pairs
from srit.launch import run
from srit.losses import linear_dpo, trained_hidden
from srit.models import Decoder
from srit.models.lora import disabled
from srit.models.ops import to_device
from srit.runtime import distributed
from srit.runtime.run_dir import claim_output_dir, write_run
from srit.text.tokenizer import load_tokenizer
from srit.training import parallel
from srit.training.metrics import MetricsLog
from srit.training.reference import collate_pairs, model_hash, reference_logps
from srit.training.setup import Optimization, batches_of, load_for_training, longest_row, prepare

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
           "logps/chosen", "logps/rejected")


def score(model: Decoder, batch: Batch, ref_logps: Tensor | None, cfg: DPOConfig,
          scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch of pairs, scale * their sum, and the sums of METRICS, (7,).

    Without ref_logps the reference is the model with its adapter switched off.
    """
    ref_hidden = None
    if ref_logps is None:
        with disabled(model), torch.no_grad():
            ref_hidden = trained_hidden(model, batch)
    loss, pairs = linear_dpo(
        trained_hidden(model, batch), model.head_weight, batch.targets, batch.cu_targets, ref_logps,
        ref_hidden=ref_hidden, beta=cfg.beta, loss_type=cfg.loss_type,
        label_smoothing=cfg.label_smoothing, rpo_alpha=cfg.rpo_alpha or 0.0, scale=scale)
    chosen, rejected = pairs.chosen_rewards, pairs.rejected_rewards
    metrics = torch.stack([pairs.losses, chosen, rejected, (chosen > rejected).float(),
                           chosen - rejected, pairs.chosen_logps, pairs.rejected_logps])
    return loss, metrics.sum(1)


@torch.no_grad()
def evaluate(model: Decoder, pairs: list[Pair], ref: Tensor, micro_batches: list[list[int]],
             cfg: DPOConfig, device: torch.device) -> dict[str, float]:
    """Every metric of training on held-out pairs, each pair weighing the same."""
    model.eval()
    sums = torch.zeros(len(METRICS), device=device)
    own = micro_batches[distributed.rank() :: distributed.world_size()]
    for rows, weight in distributed.pad_to_longest_rank(own, micro_batches[0]):
        batch = collate_pairs([pairs[i] for i in rows]).to(device)
        sums += weight * score(model, batch, to_device(ref[rows].flatten(), device), cfg)[1]
    model.train()
    parallel.reshard(model)
    means = (distributed.all_reduce_sum(sums) / len(pairs)).tolist()
    return {f"eval_{name}": value for name, value in zip(METRICS, means, strict=True)}


def main(cfg: DPOConfig) -> None:
    started = time.time()
    device = distributed.setup(cfg.device, cfg.ddp_timeout)
    if distributed.rank() == 0:
        claim_output_dir(cfg.output_dir, "dpo", cfg)
    distributed.barrier()

    tokenizer = load_tokenizer(cfg.model_name_or_path)
    model, config = load_for_training(cfg, tokenizer, device)
    max_length = longest_row(cfg, config)
    train, counts = read_pairs(cfg.train_file, tokenizer, max_length)
    held_out, held_counts, eval_batches = [], None, []
    if cfg.eval_file:
        held_out, held_counts = read_pairs(cfg.eval_file, tokenizer, max_length)
        held_counts.name = "evaluation pairs"
        size = cfg.per_device_eval_batch_size
        eval_batches = [list(range(i, min(i + size, len(held_out))))
                        for i in range(0, len(held_out), size)]

    reference = model_hash(model)
    prepare(model, cfg, device)  # an adapter is zero at first: still the reference
    sizes = [pair.num_tokens for pair in train]
    units, batch_size = batches_of([pair.stream_length for pair in train], cfg)
    schedule = Schedule(len(units), batch_size, cfg.gradient_accumulation_steps, distributed.world_size(),
                        cfg.seed, cfg.shuffle_dataset)
    total = schedule.total_steps(cfg.num_train_epochs, cfg.max_steps)
    ref = held_ref = torch.empty(0, 2)
    if cfg.precompute_ref_log_probs:
        first_epoch = [rows for step in range(min(total, schedule.steps_per_epoch))
                       for rows in schedule.rows(step, distributed.rank(), units)]
        cache = Path(cfg.output_dir) / "ref_logps.jsonl"
        ref = reference_logps(model, train, first_epoch, reference, cache, device)
    if held_out:
        held_ref = reference_logps(model, held_out, eval_batches[distributed.rank() :: distributed.world_size()],
                                   reference, Path(cfg.output_dir) / "ref_logps_eval.jsonl", device)
    opt = Optimization(cfg, model, config, tokenizer, schedule)
    start = opt.resume(reference)
    if distributed.rank() == 0:
        print(counts, *([held_counts] if held_counts else []), sep="\n")
        print(f"{total} steps, {schedule.steps_per_epoch} an epoch")

    log = MetricsLog(cfg.output_dir, start, total, opt.state.log)
    for step in range(start, total):
        micro = [schedule.rows(step, rank, units) for rank in range(distributed.world_size())]
        everyone = [i for rank in micro for rows in rank for i in rows]
        n_pairs, seen = len(everyone), sum(sizes[i] for i in everyone)
        sums = torch.zeros(len(METRICS), device=device)
        for rows, weight in opt.passes(micro):
            batch = collate_pairs([train[i] for i in rows]).to(device)
            known = None
            if cfg.precompute_ref_log_probs:
                known = to_device(ref[rows].flatten(), device)
            loss, metrics = score(model, batch, known, cfg, scale=weight / n_pairs)
            loss.backward()
            sums += weight * metrics
        distributed.all_reduce_sum(sums)
        grad_norm, finite = opt.step(step, sums[0], [train[i].id for i in everyone])
        opt.state.num_tokens += seen

        log.add({**dict(zip(METRICS, sums, strict=True)), "grad_norm": grad_norm * n_pairs},
                n_pairs, seen, finite)
        values = {}
        if opt.eval_due():
            values = evaluate(model, held_out, held_ref, eval_batches, cfg, device)
            opt.keep_best(values["eval_loss"])
        if opt.log_due() or values:
            opt.count_skipped()
            log.row(step + 1, {"learning_rate": opt.learning_rate(step),
                               "epoch": (step + 1) / schedule.steps_per_epoch,
                               "num_tokens": opt.state.num_tokens,
                               "skipped_steps": opt.state.skipped_steps, **values})
        opt.checkpoint(log)
    log.close()

    opt.export()
    if distributed.rank() == 0:
        write_run(cfg.output_dir, "dpo", cfg, [c for c in (counts, held_counts) if c], started,
                  steps=total, num_tokens=opt.state.num_tokens, best_step=opt.state.best_step,
                  reference=reference)
        print(f"{cfg.output_dir}: model, metrics.jsonl, run.json")
    opt.clean()
    distributed.shutdown()


if __name__ == "__main__":
    run(DPOConfig, "dpo", main)
