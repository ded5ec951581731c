"""`srit <command>`: the stage scripts and the tools around them behind one name."""

import importlib
import sys

COMMANDS = {
    "run": ("the whole method from one recipe", "srit.commands.run", "RunConfig"),
    "report": ("HTML and Markdown page of a run", "srit.commands.report", "ReportConfig"),
    "demo": ("the method on a small world that it makes itself", "srit.commands.demo", "DemoConfig"),
    "demos": ("ask a teacher model for demonstrations", "srit.commands.demos", "DemosConfig"),
    "data": ("convert a published data set to questions", "srit.commands.data", "DataConfig"),
    "sft": ("phase 1: instruct", "srit.train.sft", "SFTConfig"),
    "sample": ("phase 2: the student answers the questions", "srit.train.sample", "SampleConfig"),
    "pair": ("phase 2: preference pairs from graded answers", "srit.train.pair", "PairConfig"),
    "dpo": ("phase 2: self-refine on the pairs", "srit.train.dpo", "DPOConfig"),
    "eval": ("accuracy on questions with ground truth", "srit.train.eval", "EvalConfig"),
    "plan": ("memory of a training step, before it runs", "srit.commands.plan", "PlanConfig"),
    "convert": ("GGUF, hub id or adapter to a Hugging Face directory", "srit.commands.convert",
                "ConvertConfig"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        print("usage: srit <command> --help\n")
        print("\n".join(f"  {key:8} {text}" for key, (text, _, _) in COMMANDS.items()))
        sys.exit(0 if name in ("--help", "-h") else f"error: unknown command '{name}'")
    _, module_name, config_name = COMMANDS[name]
    module = importlib.import_module(module_name)
    from srit.launch import run

    run(getattr(module, config_name), name, module.main, sys.argv[2:])


if __name__ == "__main__":
    main()
