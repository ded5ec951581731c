"""The settings of the commands that are no stage: their flags, as srit/config.py holds the stages'.

Apart from what they steer, because that imports torch: help and errors in flags need not wait for it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from srit.config import InstructConfig, QuestionConfig, Settings, check_least
from srit.runtime.files import InputError

PACKAGE = Path(__file__).resolve().parents[1]
# The recipes lie in an installed package, or beside it in the source tree.
DEMO_RECIPE = (PACKAGE if (PACKAGE / "runs").is_dir() else PACKAGE.parent) / "runs" / "demo.yaml"


@dataclass
class RunConfig:
    """Run the whole method from one recipe: evaluate, instruct, evaluate, self-refine, evaluate."""

    config: str
    """Recipe (YAML)."""
    output_dir: str | None = None
    """Overrides the recipe's."""
    seed: int | None = None
    """Overrides the recipe's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Overrides that at the recipe's top."""
    device: str | None = None
    """Overrides the recipe's."""
    max_time: float = 0.0
    """Minutes after which the run saves and stops, to be resumed; 0: no limit."""


@dataclass
class ReportConfig:
    """Write report.html and report.md into a run directory."""

    run_dir: list[str]
    """Directory of `srit run`. More (other seeds of the same recipe) add a combined table."""
    show_questions: bool = True
    """False: show the ids of questions instead of their texts, which may not be redistributed."""


@dataclass
class DemoConfig:
    """Run the whole method on a small synthetic world, in minutes on two CPU cores."""

    output_dir: str = "out/demo"
    """Where everything goes, one folder per seed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of world, base model and method; the method runs once for each."""
    recipe: str = str(DEMO_RECIPE)
    """Recipe of the method; in it, ${SRIT_DEMO_DIR} is the folder of the seed."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("--seeds: name at least one")


@dataclass
class DemosConfig(QuestionConfig):
    """Phase 0: get chain-of-thought demonstrations from a teacher model behind a server."""

    train_file: list[str]
    """Question files."""
    output_dir: str
    """Where demos.jsonl, answers.jsonl (the raw answers as they arrive) and run.json go."""
    model: str
    """Name of the teacher model on the server."""
    base_url: str | None = None
    """Address of the server, such as http://localhost:8000/v1; default: OPENAI_BASE_URL."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. (A key on the command line could leak.)"""
    temperature: float = 0.0
    """0 is greedy."""
    max_new_tokens: int = 512
    """Maximum length of an answer. Answers that reach it are dropped and counted."""
    concurrency: int = 8
    """Number of simultaneous requests."""
    max_retries: int = 5
    """Retries after a connection error, a timeout or an overloaded server, with back-off."""
    timeout: float = 120.0
    """Seconds from sending a request to the last byte of its answer."""
    max_time: float = 0.0
    """Minutes after which the run stops; the same command resumes it. 0: no limit."""
    limit: int | None = None
    """Use only the first questions of every file."""
    overwrite_output_dir: bool = False
    """Delete output_dir and start over; otherwise an unfinished run is resumed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "max_new_tokens", "concurrency", "limit")
        check_least(self, 0, "temperature", "max_retries", "max_time")
        if not self.timeout > 0:
            raise InputError(f"--timeout {self.timeout}: must be positive")


@dataclass
class DataConfig(Settings):
    """Convert a published data set to question rows, or generate synthetic ones."""

    name: Literal["gsm8k", "svamp", "asdiv", "math", "multiarith", "addsub", "singleeq", "singleop",
                  "aqua", "csqa", "obqa", "arc", "piqa", "siqa", "mmlu", "synthetic", "reasoning_gym"]
    """Data set; it determines the format of the input."""
    output: str
    """Questions file to write (JSON Lines)."""
    input: str | None = None
    """Published file, or another source of docs/data.md. By default the Hub, at a pinned commit."""
    split: str = "train"
    """Split on the Hub, without input."""
    labels: str | None = None
    """Labels file, one label per line, for data sets that publish answers separately (piqa, siqa)."""
    limit: int | None = None
    """Use only the first records."""
    rationales: Literal["none", "plain", "marked"] = "none"
    """gsm8k: demonstrations, its human rationales without or with their <<48/2=24>> marks."""
    seed: int = 0
    """synthetic, reasoning_gym: seed."""
    num_rows: int = 1000
    """synthetic, reasoning_gym: number of questions."""
    tasks: list[str] = field(default_factory=list)
    """reasoning_gym: tasks, such as leg_counting lcm; by default all that have one right answer."""
    domain: Literal["in", "out"] = "in"
    """synthetic: problems of the demo's training world, or of its out-of-domain test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "limit", "num_rows")


@dataclass
class ShowConfig(InstructConfig):
    """Show rows as the model sees them, token by token: prompt, trained, forced, turn end, dropped.

    srit show FILE --model_name_or_path M. With --config RECIPE the settings are those of its sft.
    """

    file: list[str]
    """Demonstrations, other rows to train on, pairs or questions, in any format of docs/data.md."""
    model_name_or_path: str
    """Directory in Hugging Face layout, hub id, or .gguf file; only its tokenizer is read."""
    limit: int = 3
    """Rows of every file that are shown; 0: all."""
    output: str | None = None
    """HTML page to write instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "limit")


@dataclass
class PlanConfig(Settings):
    """Predict the memory of a training step on each GPU, and the most tokens that fit."""

    model_name_or_path: str
    """Directory, hub id, .gguf file, or a published shape such as Llama-2-7B."""
    stage: Literal["sft", "dpo"] = "dpo"
    """DPO also saves the concatenated keys and values of its branches."""
    gpus: int = 1
    """Number of GPUs."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: a whole model on each GPU. fsdp: a shard of everything on each GPU."""
    tokens: int = 16384
    """Tokens per forward on each GPU (max_tokens_per_batch)."""
    gradient_accumulation_steps: int = 1
    """Forwards per optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations layer by layer in the backward."""
    checkpoint_policy: Literal["block", "mlp"] = "block"
    """What gradient_checkpointing recomputes: the whole layer, or only its MLP."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype."""
    use_peft: bool = False
    """Train a LoRA adapter."""
    lora_r: int = 16
    """Rank of the adapter."""
    max_memory: float = 80.0
    """GiB of one GPU."""
    device: Literal["cuda", "cpu"] = "cuda"
    """On a CPU the libraries take less memory and the chunk of logits is smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "gpus", "tokens", "gradient_accumulation_steps", "lora_r")
        if self.max_memory <= 0:
            raise InputError(f"--max_memory {self.max_memory}: must be positive")


@dataclass
class ConvertConfig:
    """Read a directory, hub id or .gguf file; write config, safetensors and tokenizer."""

    model_name_or_path: str
    """Directory in Hugging Face layout, hub id, or .gguf file."""
    output_dir: str
    """Where the Hugging Face directory goes."""
    adapter: str | None = None
    """PEFT adapter directory to merge into the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the written weights."""
