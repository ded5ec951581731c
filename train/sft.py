"""Phase 1, instruct: fine-tune the student on a teacher's chain-of-thought demonstrations.

    L(θ) = − Σ_t log π_θ(â_t | â_<t, q, i) / number of trained tokens        (arXiv 2405.00402, §2.1)

i is the instruction, q the question, â the demonstration; prompt tokens are never trained. The sum
is divided once by the trained tokens of the whole optimizer step, so neither gradient accumulation
nor the number of GPUs changes the loss.

In:   demonstrations (or TRL rows: prompt/completion, messages)
Out:  a model in Hugging Face layout, metrics.jsonl, run.json, checkpoint-N/

    python train/sft.py --model_name_or_path M --train_file demos.jsonl --output_dir out/sft
    torchrun --nproc_per_node 8 train/sft.py --config runs/x.yaml
"""

import time

import torch
from torch import Tensor

from srit.config import SFTConfig
from srit.data.batch_sampler import Schedule
from srit.data.batches import Batch, collate
from srit.data.examples import Example, read_sft
from srit.launch import run
from srit.losses import linear_nll, token_logps, trained_hidden
from srit.models import Decoder
from srit.runtime import distributed
from srit.runtime.run_dir import claim_output_dir, write_run
from srit.text.tokenizer import load_tokenizer
from srit.training import parallel
from srit.training.metrics import MetricsLog
from srit.training.setup import Optimization, batches_of, load_for_training, longest_row, prepare

METRICS = ("loss", "entropy", "mean_token_accuracy")


def score(model: Decoder, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """scale * sum of −log π over a micro-batch's trained tokens, and the sums of METRICS, (3,)."""
    loss, tokens = linear_nll(trained_hidden(model, batch), model.head_weight, batch.targets,
                              scale=scale, return_stats=True)
    return loss, torch.stack([-tokens.logps.sum(), tokens.entropy.sum(), tokens.correct.sum()])


@torch.no_grad()
def evaluate(model: Decoder, examples: list[Example], batch_size: int,
             device: torch.device) -> float:
    """Mean negative log-likelihood of the trained tokens, each token weighing the same."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nll, tokens
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    for some, weight in distributed.pad_to_longest_rank(batches[distributed.rank() :: distributed.world_size()], batches[0]):
        batch = collate([[e.tokens] for e in some]).to(device)
        total[0] -= weight * token_logps(model, batch).sum()
        total[1] += weight * len(batch.targets)
    nll, tokens = distributed.all_reduce_sum(total).tolist()
    model.train()
    parallel.reshard(model)
    return nll / tokens


def main(cfg: SFTConfig) -> None:
    started = time.time()
    device = distributed.setup(cfg.device, cfg.ddp_timeout)
    if distributed.rank() == 0:
        claim_output_dir(cfg.output_dir, "sft", cfg)
    distributed.barrier()

    tokenizer = load_tokenizer(cfg.model_name_or_path)
    model, config = load_for_training(cfg, tokenizer, device)
    max_length = longest_row(cfg, config)
    train, counts = read_sft(cfg.train_file, tokenizer, max_length, cfg.prompt_style,
                             cfg.filter_demos)
    held_out, held_counts = [], None
    if cfg.eval_file:
        held_out, held_counts = read_sft(cfg.eval_file, tokenizer, max_length, cfg.prompt_style,
                                         cfg.filter_demos)
        held_counts.name = "evaluation demonstrations"
    prepare(model, cfg, device)

    lengths = [len(e.tokens.ids) for e in train]
    trained = [sum(e.tokens.mask[1:]) for e in train]
    units, batch_size = batches_of(lengths, cfg, capacity=max_length if cfg.packing else 0)
    schedule = Schedule(len(units), batch_size, cfg.gradient_accumulation_steps, distributed.world_size(),
                        cfg.seed, cfg.shuffle_dataset)
    opt = Optimization(cfg, model, config, tokenizer, schedule)
    start = opt.resume()
    if distributed.rank() == 0:
        print(counts, *([held_counts] if held_counts else []), sep="\n")
        print(f"{opt.total} steps, {schedule.steps_per_epoch} an epoch, {sum(lengths):,} tokens, "
              f"{sum(trained):,} of them trained")

    log = MetricsLog(cfg.output_dir, start, opt.total, opt.state.log)
    for step in range(start, opt.total):
        micro = [schedule.rows(step, rank, units) for rank in range(distributed.world_size())]
        everyone = [i for rank in micro for rows in rank for i in rows]
        n_trained, seen = sum(trained[i] for i in everyone), sum(lengths[i] for i in everyone)
        sums = torch.zeros(len(METRICS), device=device)
        for rows, weight in opt.passes(micro):
            batch = collate([[train[i].tokens] for i in rows]).to(device)
            loss, metrics = score(model, batch, weight / n_trained)
            loss.backward()
            sums += weight * metrics
        distributed.all_reduce_sum(sums)
        grad_norm, finite = opt.step(step, sums[0], [train[i].id for i in everyone])
        opt.state.num_tokens += seen

        log.add({**dict(zip(METRICS, sums, strict=True)), "grad_norm": grad_norm * n_trained},
                n_trained, seen, finite)
        values = {}
        if opt.eval_due():
            values["eval_loss"] = evaluate(model, held_out, cfg.per_device_eval_batch_size, device)
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
        write_run(cfg.output_dir, "sft", cfg, [c for c in (counts, held_counts) if c], started,
                  steps=opt.total, num_tokens=opt.state.num_tokens, best_step=opt.state.best_step)
        print(f"{cfg.output_dir}: model, metrics.jsonl, run.json")
    opt.clean()
    distributed.shutdown()


if __name__ == "__main__":
    run(SFTConfig, "sft", main)
