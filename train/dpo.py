"""Phase 2, self-refine: Direct Preference Optimization on the student's own answers.

    L = − E log σ( β [log π_θ(y_w|x) − log π_inst(y_w|x)] − β [log π_θ(y_l|x) − log π_inst(y_l|x)] )
                                                             (arXiv 2405.00402, §2.2; 2305.18290 eq. 7)

π_θ starts as the instructed student π_inst, which stays the frozen reference. There is never a second
model: the reference's log-probs are computed once, before the first step, or (LoRA) with the adapter
switched off. The formula itself is `dpo_loss` in kernels/preference_loss.py.

In:   pairs.jsonl (or TRL rows: prompt/chosen/rejected, strings or message lists)
Out:  a model in Hugging Face layout, metrics.jsonl, run.json, checkpoint-N/

    python train/dpo.py --model_name_or_path out/sft --train_file pairs.jsonl --output_dir out/dpo
    torchrun --nproc_per_node 8 train/dpo.py --config runs/smollm2_math.yaml
"""

import torch
from torch import Tensor

from srit import launch
from srit.config import DPOConfig
from srit.data.batch_sampler import BatchSampler, eval_batches
from srit.data.batches import Batch, Pair, collate_pairs
from srit.data.examples import read_pairs
from srit.data.inputs import stage_inputs
from srit.kernels.fused_linear_loss import linear_dpo
from srit.models import Decoder
from srit.models.lora import disabled
from srit.runtime.distributed import all_reduce_sum
from srit.runtime.run_dir import Run
from srit.training.fsdp import evaluating
from srit.training.metrics import MetricsLog
from srit.training.optimizer import learning_rate, make_adamw, optimizer_step, sync_on_last
from srit.training.reference import ReferenceLogps
from srit.training.saving import Checkpoints
from srit.training.setup import add_adapter_and_shard, load_student, read_datasets

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
           "logps/chosen", "logps/rejected")


def compute_loss(model: Decoder, batch: Batch, cfg: DPOConfig,
                 scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale * the sum of the pairs' losses, and the sums of METRICS over the pairs."""
    ref_hidden = None
    if batch.ref_logps is None:  # then the reference is the model with its adapter switched off
        with disabled(model), torch.no_grad():
            ref_hidden = batch.trained_hidden(model)
    # Chunk by chunk: logits -> log-probs -> dpo_loss (kernels/preference_loss.py) -> gradients.
    loss, stats = linear_dpo(
        batch.trained_hidden(model), model.head_weight, batch.targets, batch.cu_targets,
        batch.ref_logps, ref_hidden=ref_hidden, beta=cfg.beta, loss_type=cfg.loss_type,
        label_smoothing=cfg.label_smoothing, rpo_alpha=cfg.rpo_alpha or 0.0, scale=scale)
    chosen, rejected = stats.chosen_rewards, stats.rejected_rewards
    metrics = torch.stack([stats.losses, chosen, rejected, (chosen > rejected).float(),
                           chosen - rejected, stats.chosen_logps, stats.rejected_logps])
    return loss, metrics.sum(1)


def evaluate(model: Decoder, held_out: list[Pair], cfg: DPOConfig,
             device: torch.device) -> dict[str, float]:
    """Every metric on the held-out pairs, each pair weighing the same."""
    sums = torch.zeros(len(METRICS), device=device)
    with evaluating(model):
        size = cfg.per_device_eval_batch_size
        for batch, weight in eval_batches(held_out, collate_pairs, size, device):
            sums += weight * compute_loss(model, batch, cfg)[1]
    means = (all_reduce_sum(sums) / len(held_out)).tolist()
    return {f"eval_{name}": value for name, value in zip(METRICS, means, strict=True)}


def main(cfg: DPOConfig) -> None:
    run = Run("dpo", cfg, stage_inputs)
    model, tokenizer, max_length = load_student(run)
    train, held_out = read_datasets(run, read_pairs, tokenizer, max_length, cfg.parse_special_tokens)
    run.claim()  # from here on output_dir is ours
    sampler = BatchSampler(train, collate_pairs, cfg)
    reference = ReferenceLogps(model, cfg, run.device)
    add_adapter_and_shard(model, cfg, run.device)  # a new adapter is zero: still the reference
    reference.score(sampler, held_out)

    optimizer, total = make_adamw(model, cfg), sampler.total_steps
    checkpoints = Checkpoints(cfg, model, optimizer, tokenizer)
    state = checkpoints.resume(run, total, sampler.step_size, reference.hash)
    run.say(f"{total} steps, {sampler.steps_per_epoch} an epoch")
    log = MetricsLog(cfg.output_dir, state, cfg.max_skipped_steps)

    for step in range(state.step, total):
        pairs = sampler.step_items(step)  # on all ranks
        sums = torch.zeros(len(METRICS), device=run.device)
        for batch, weight in sync_on_last(model, sampler.micro_batches(step, run.device)):
            loss, metrics = compute_loss(model, batch, cfg, scale=weight / len(pairs))
            loss.backward()
            sums += weight * metrics
        all_reduce_sum(sums)
        rate = learning_rate(step, total, cfg)
        grad_norm, finite = optimizer_step(model, optimizer, rate, cfg.max_grad_norm, loss=sums[0])

        state.advance(pairs)
        log.add(dict(zip(METRICS, sums, strict=True)), grad_norm, len(pairs), pairs, finite)
        eval_metrics, last = {}, state.step == total
        if held_out and (last or state.step % (cfg.eval_steps or sampler.steps_per_epoch) == 0):
            eval_metrics = evaluate(model, held_out, cfg, run.device)
            checkpoints.best.keep(eval_metrics["eval_loss"], state)
        if eval_metrics or last or state.step % cfg.logging_steps == 0:
            log.write(rate, state.step / sampler.steps_per_epoch, eval_metrics)
        checkpoints.save_if_due(state, log)

    files = checkpoints.finish(state, log)
    run.finish(files, steps=total, num_tokens=state.num_tokens, best_step=state.best_step,
               reference=reference.hash)


if __name__ == "__main__":
    launch.run(DPOConfig, "dpo", main)
