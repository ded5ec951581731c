"""`srit COMMAND`: the stages and tools as one command."""

import importlib
import sys

import srit
from srit import config, launch
from srit.commands import config as commands
from srit.runtime.outcome import BAD_INPUT

COMMANDS = {
    "run": ("the whole method from one recipe", commands.RunConfig, "srit.commands.run"),
    "report": ("HTML and Markdown report of a run", commands.ReportConfig, "srit.commands.report"),
    "demo": ("the whole method on a small synthetic world", commands.DemoConfig, "srit.commands.demo"),
    "demos": ("ask a teacher model for demonstrations", commands.DemosConfig, "srit.commands.demos"),
    "data": ("convert a published data set to question rows", commands.DataConfig,
             "srit.commands.data"),
    "show": ("rows as the model sees them, token by token", commands.ShowConfig, "srit.commands.show"),
    "sft": ("phase 1: instruct (SFT)", config.SFTConfig, "srit.train.sft"),
    "sample": ("phase 2: the student answers the questions", config.SampleConfig, "srit.train.sample"),
    "pair": ("phase 2: preference pairs from graded answers", config.PairConfig, "srit.train.pair"),
    "dpo": ("phase 2: self-refine on the pairs (DPO)", config.DPOConfig, "srit.train.dpo"),
    "eval": ("accuracy on questions with ground truth", config.EvalConfig, "srit.train.eval"),
    "plan": ("predict the memory of a training step", commands.PlanConfig, "srit.commands.plan"),
    "convert": ("GGUF, hub id or adapter to a Hugging Face directory", commands.ConvertConfig,
                "srit.commands.convert"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"srit {srit.__version__}")
        return
    if name not in COMMANDS:
        print("usage: srit COMMAND [--help]\n       srit --version\n")
        print("\n".join(f"  {key:8} {text}" for key, (text, _, _) in COMMANDS.items()))
        if name not in ("--help", "-h"):
            print(f"error: unknown command '{name}'", file=sys.stderr)
            sys.exit(BAD_INPUT)
        return
    _, cls, module = COMMANDS[name]
    # Imported after the flags are read: most commands import torch, which takes seconds.
    launch.run(cls, name, lambda cfg: importlib.import_module(module).main(cfg), sys.argv[2:])


if __name__ == "__main__":
    main()
