"""The table of docs/scaling.md: both stages on 1, 8 and 64 GPUs, by `srit plan`'s arithmetic.

    python benchmarks/plan_table.py
"""

from srit.commands.plan import GIB, PlanConfig, most_tokens, plan, read_shape

SETTINGS = {  # by GPUs: what a user would choose
    "Llama-3.2-1B": {1: {}, 8: {"parallel": "ddp"}, 64: {"parallel": "ddp"}},
    "Llama-2-7B": {1: {"use_peft": True}, 8: {"parallel": "fsdp"}, 64: {"parallel": "fsdp"}},
    "Llama-2-70B": {1: {"use_peft": True}, 8: {"parallel": "fsdp", "use_peft": True},
                    64: {"parallel": "fsdp"}},
}


def main() -> None:
    print("| model | GPUs | settings | stage | weights, gradients, moments | kept and head | gathered "
          "| peak | most tokens | sent | time sending | matrix products |")
    print("|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, by_gpus in SETTINGS.items():
        config = read_shape(name)
        for gpus, settings in by_gpus.items():
            for stage in ("sft", "dpo"):
                cfg = PlanConfig(name, stage, gpus=gpus, gradient_checkpointing=True, **settings)
                p, most = plan(config, cfg), most_tokens(config, cfg)
                shown = " ".join(str(v) if k == "parallel" else "LoRA" for k, v in settings.items())
                held = p.weights + p.gradients + p.moments
                print(f"| {name} | {gpus} | {shown or 'full'} | {stage} | {held / GIB:.1f} | "
                      f"{(p.kept + p.cast + p.head) / GIB:.1f} | {p.gathered / GIB:.1f} | "
                      f"{p.peak / GIB:.1f} | {f'{most:,}' if most else 'does not fit'} | "
                      f"{p.sent / 1e9:.1f} | {p.sent / (cfg.bandwidth * 1e9):.2f} s | "
                      f"{p.compute_seconds:.2f} s |")


if __name__ == "__main__":
    main()
