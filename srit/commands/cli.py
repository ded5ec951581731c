"""`srit COMMAND`: the stages and tools as one command."""

import importlib
import sys

from srit.runtime.outcome import BAD_INPUT

COMMANDS = {
    "run": ("the whole method from one recipe", "srit.commands.run", "RunConfig"),
    "report": ("HTML and Markdown report of a run", "srit.commands.report", "ReportConfig"),
    "demo": ("the whole method on a small synthetic world", "srit.commands.demo", "DemoConfig"),
    "demos": ("ask a teacher model for demonstrations", "srit.commands.demos", "DemosConfig"),
    "data": ("convert a published data set to question rows", "srit.commands.data", "DataConfig"),
    "sft": ("phase 1: instruct (SFT)", "srit.train.sft", "SFTConfig"),
    "sample": ("phase 2: the student answers the questions", "srit.train.sample", "SampleConfig"),
    "pair": ("phase 2: preference pairs from graded answers", "srit.train.pair", "PairConfig"),
    "dpo": ("phase 2: self-refine on the pairs (DPO)", "srit.train.dpo", "DPOConfig"),
    "eval": ("accuracy on questions with ground truth", "srit.train.eval", "EvalConfig"),
    "plan": ("predict the memory of a training step", "srit.commands.plan", "PlanConfig"),
    "convert": ("GGUF, hub id or adapter to a Hugging Face directory", "srit.commands.convert",
                "ConvertConfig"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        print("usage: srit COMMAND [--help]\n")
        print("\n".join(f"  {key:8} {text}" for key, (text, _, _) in COMMANDS.items()))
        if name not in ("--help", "-h"):
            print(f"error: unknown command '{name}'", file=sys.stderr)
            sys.exit(BAD_INPUT)
        sys.exit()
    _, module_name, config_name = COMMANDS[name]
    module = importlib.import_module(module_name)
    from srit.launch import run

    run(getattr(module, config_name), name, module.main, sys.argv[2:])


if __name__ == "__main__":
    main()
