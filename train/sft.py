"""Phase 1, instruct: fine-tune the student on a teacher's chain-of-thought demonstrations.

    L(θ) = − Σ_t log π_θ(â_t | â_<t, q, i) / number of trained tokens        (arXiv 2405.00402, §2.1)

i is the instruction, q the question, â the demonstration; prompt tokens are never trained. The sum
is divided once by the trained tokens of the whole optimizer step, so neither gradient accumulation
nor the number of GPUs changes the loss.

In:   demonstrations (or TRL rows: prompt/completion, messages)
Out:  a model in Hugging Face layout, metrics.jsonl, run.json, checkpoint-N/

    python train/sft.py --model_name_or_path M --train_file demos.jsonl --output_dir out/sft
    torchrun --nproc_per_node 8 train/sft.py --config runs/smollm2_math.yaml
"""

import torch
from torch import Tensor

from srit import launch
from srit.config import SFTConfig
from srit.data.batch_sampler import BatchSampler, eval_batches
from srit.data.batches import Batch, Example, collate_examples
from srit.data.examples import read_sft
from srit.data.inputs import stage_inputs
from srit.kernels.fused_linear_loss import linear_nll
from srit.losses import token_logps
from srit.models import Decoder
from srit.runtime.distributed import all_reduce_sum
from srit.runtime.run_dir import Run
from srit.training.fsdp import evaluating
from srit.training.metrics import MetricsLog
from srit.training.optimizer import learning_rate, make_adamw, optimizer_step, sync_on_last
from srit.training.saving import Checkpoints
from srit.training.setup import add_adapter_and_shard, load_student, read_datasets

METRICS = ("loss", "entropy", "mean_token_accuracy")


def compute_loss(model: Decoder, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """scale * the sum of −log π over the trained tokens, and the sums of METRICS over them."""
    loss, stats = linear_nll(batch.trained_hidden(model), model.head_weight, batch.targets,
                             scale=scale, return_stats=True)
    return loss, torch.stack([-stats.logps.sum(), stats.entropy.sum(), stats.correct.sum()])


def evaluate(model: Decoder, held_out: list[Example], cfg: SFTConfig,
             device: torch.device) -> dict[str, float]:
    """Mean negative log-likelihood of the trained tokens, each token weighing the same."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nll, tokens
    with evaluating(model):
        size = cfg.per_device_eval_batch_size
        for batch, weight in eval_batches(held_out, collate_examples, size, device):
            sums[0] -= weight * token_logps(model, batch).sum()
            sums[1] += weight * len(batch.targets)
    nll, tokens = all_reduce_sum(sums).tolist()
    return {"eval_loss": nll / tokens}


def main(cfg: SFTConfig) -> None:
    run = Run("sft", cfg, stage_inputs)
    model, tokenizer, max_length = load_student(run)
    train, held_out = read_datasets(run, read_sft, tokenizer, max_length, cfg)
    run.claim()  # from here on output_dir is ours
    sampler = BatchSampler(train, collate_examples, cfg, bin_tokens=max_length if cfg.packing else 0)
    add_adapter_and_shard(model, cfg, run.device)

    optimizer, total = make_adamw(model, cfg), sampler.total_steps
    checkpoints = Checkpoints(cfg, model, optimizer, tokenizer)
    state = checkpoints.resume(run, total, sampler.step_size)
    run.say(f"{total} steps, {sampler.steps_per_epoch} an epoch, "
            f"{sum(e.num_tokens for e in train):,} tokens, "
            f"{sum(e.num_trained for e in train):,} of them trained")
    log = MetricsLog(cfg.output_dir, state, cfg.max_skipped_steps)

    for step in range(state.step, total):
        examples = sampler.step_items(step)  # on all ranks
        num_trained = sum(example.num_trained for example in examples)
        sums = torch.zeros(len(METRICS), device=run.device)
        for batch, weight in sync_on_last(model, sampler.micro_batches(step, run.device)):
            loss, metrics = compute_loss(model, batch, scale=weight / num_trained)
            loss.backward()
            sums += weight * metrics
        all_reduce_sum(sums)
        rate = learning_rate(step, total, cfg)
        grad_norm, finite = optimizer_step(model, optimizer, rate, cfg.max_grad_norm, loss=sums[0])

        state.advance(examples)
        log.add(dict(zip(METRICS, sums, strict=True)), grad_norm, num_trained, examples, finite)
        eval_metrics, last = {}, state.step == total
        if held_out and (last or state.step % (cfg.eval_steps or sampler.steps_per_epoch) == 0):
            eval_metrics = evaluate(model, held_out, cfg, run.device)
            checkpoints.best.keep(eval_metrics["eval_loss"], state)
        if eval_metrics or last or state.step % cfg.logging_steps == 0:
            log.write(rate, state.step / sampler.steps_per_epoch, eval_metrics)
        checkpoints.save_if_due(state, log)

    files = checkpoints.finish(state, log)
    run.finish(files, steps=total, num_tokens=state.num_tokens, best_step=state.best_step)


if __name__ == "__main__":
    launch.run(SFTConfig, "sft", main)
