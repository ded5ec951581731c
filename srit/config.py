"""The settings of every stage: dataclasses whose fields are the flags and the YAML keys.

A field's docstring is its help text; `__post_init__` refuses values without meaning.
"""

import datetime
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from srit.runtime import limits
from srit.runtime.files import InputError

PromptStyle = Literal["direct", "cot"]


def _check(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise InputError(f"--{name} {value}: must be {rule}")


def check_least(config: Any, least: int, *names: str) -> None:
    """Raise InputError for a setting below `least`; None is a setting that is left out."""
    for name in names:
        value = getattr(config, name)
        _check(value is None or value >= least, name, value, f"{least} or more")


class Settings:
    """Base of the others. Refuses numbers that no torch or clock function takes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "seed":
                _check(0 <= value <= limits.SEED, name, value, f"from 0 to {limits.SEED}")
            elif isinstance(value, int):
                _check(abs(value) <= limits.INTEGER, name, value, f"at most {limits.INTEGER}")
            elif isinstance(value, float):
                _check(limits.is_number(value), name, value, f"a number, at most {limits.NUMBER:g}")


@dataclass(kw_only=True)
class TemplateConfig(Settings):
    """What a chat template is given beside the messages."""

    date: str | None = None
    """The day that chat templates show, as YYYY-MM-DD; by default the one on which the run began."""
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables for the chat template, such as: enable_thinking False"""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            ok = self.date is None or str(datetime.date.fromisoformat(self.date)) == self.date
        except ValueError:
            ok = False
        _check(ok, "date", self.date, "a day as YYYY-MM-DD")
        for name in ("messages", "add_generation_prompt", "tools", "documents"):
            _check(name not in self.chat_template_kwargs, "chat_template_kwargs",
                   self.chat_template_kwargs, f"without {name}")


@dataclass(kw_only=True)
class RowConfig(TemplateConfig):
    """How a row to train on becomes token ids (srit/data/examples.py)."""

    max_length: int = 1024
    """Longest row in tokens; a longer one is dropped and counted, never cut."""
    parse_special_tokens: bool = True
    """Special tokens written in rows of plain text count as such; in conversations they never do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "max_length")


@dataclass(kw_only=True)
class QuestionConfig(Settings):
    """How a question is asked (srit/text/prompts.py), and who judges the answer."""

    instruction: dict[str, str] = field(default_factory=dict)
    """Instruction of a task, which replaces its own, such as: math "Solve the problem"."""
    prompt_template: dict[str, str] = field(default_factory=dict)
    """Task and its user message, with {question}, {instruction}, {choices}, {letters}, {cot_suffix}."""
    cot_suffix: str = " Let's think step by step"
    """What the prompt style cot adds behind "Answer:"."""
    system_prompt: str | None = None
    """System message in front of every question; by default none."""
    verifier: str | None = None
    """A judge of your own, FILE.py:FUNCTION, in place of the tasks' judges (docs/judges.md)."""
    allow_code_execution: bool = False
    """Run the programs that completions of task code hold, in a sandbox without network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for task, template in self.prompt_template.items():
            _check("{question}" in template, f"prompt_template {task}", repr(template),
                   "a text with {question}")


@dataclass(kw_only=True)
class InstructConfig(RowConfig, QuestionConfig):
    """Which rows phase 1 trains, and behind which prompt."""

    prompt_style: list[PromptStyle] = field(default_factory=lambda: ["cot"])
    """Prompt in front of the demonstration; both styles: each demonstration is trained with both."""
    filter_demos: bool = True
    """Keep only demonstrations whose final answer is the ground truth."""
    drop_false_equations: bool = False
    """Drop rows with an equation that is false, such as 37 - 21 = 18."""


@dataclass
class TrainConfig(RowConfig):
    """Settings that SFT and DPO share."""

    model_name_or_path: str
    """Directory in Hugging Face layout, hub id, or .gguf file."""
    train_file: list[str]
    """Rows to train on: files, directories of save_to_disk, or sets on the Hub (docs/data.md)."""
    output_dir: str
    """Where the model, checkpoints, metrics.jsonl and run.json go."""
    eval_file: list[str] = field(default_factory=list)
    """Rows for the evaluation loss, likewise."""
    seed: int = 0
    """Seed of data order and of new weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype, and of a base that an adapter keeps frozen. All that is trained is float32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    num_train_epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps; overrides num_train_epochs when positive."""
    learning_rate: float = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of all steps that warm up."""
    warmup_steps: int = 0
    """Steps that warm up; overrides warmup_ratio when positive."""
    weight_decay: float = 0.0
    """AdamW weight decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW beta1."""
    adam_beta2: float = 0.999
    """AdamW beta2."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 switches clipping off."""
    per_device_train_batch_size: int = 8
    """Rows (SFT) or pairs (DPO) in one forward pass of one process."""
    max_tokens_per_batch: int = 0
    """Token budget per forward; replaces per_device_train_batch_size. 0: off."""
    per_device_eval_batch_size: int = 8
    """Rows or pairs in one forward pass of the evaluation."""
    gradient_accumulation_steps: int = 1
    """Forward passes to one optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations layer by layer in the backward pass."""
    checkpoint_policy: Literal["block", "mlp"] = "block"
    """What gradient_checkpointing recomputes: all of a layer, or what is behind its attention."""
    torch_compile: bool = False
    """Compile the layers first: faster steps, rounded differently; needs a C++ compiler on a CPU."""
    logging_steps: int = 10
    """Steps between two rows of metrics.jsonl."""
    eval_steps: int = 0
    """Steps between evaluations; 0: at the end of every epoch. Needs eval_file."""
    save_steps: int = 0
    """Steps between checkpoints; 0: none on the way."""
    save_total_limit: int = 2
    """Checkpoints that are kept."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in host memory."""
    max_time: float = 0.0
    """Minutes after which the run saves and ends, to be continued; 0: no limit."""
    max_skipped_steps: int = 10
    """Skipped (non-finite) steps that are allowed before the run ends as diverged."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several GPUs: a whole model on each, or (fsdp) a part of everything on each."""
    ddp_timeout: float = 1800.0
    """Seconds that ranks wait for one another."""
    load_best_model_at_end: bool = True
    """Export the weights with the lowest evaluation loss (needs eval_file), not the last."""
    resume_from_checkpoint: str = "auto"
    """auto: the newest good checkpoint of output_dir, or a fresh start; or a checkpoint directory."""
    overwrite_output_dir: bool = False
    """Delete what output_dir holds and start afresh."""
    shuffle_dataset: bool = True
    """A new order every epoch, from the seed; False: the order of the file."""
    use_peft: bool = False
    """Train a LoRA adapter, and export base and adapter merged (the adapter alone in adapter/)."""
    lora_r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """The adapter is scaled by alpha / r."""
    lora_dropout: float = 0.0
    """Dropout before the adapter (SFT only)."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Modules that get an adapter, by default (all-linear) all projections of attention and MLP."""

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = [name for names in self.lora_target_modules for name in names.split(",") if name]
        _check("all-linear" not in targets or len(targets) == 1, "lora_target_modules", targets,
               "all-linear alone, or names")
        self.lora_target_modules = [] if targets == ["all-linear"] else targets
        check_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size",
                    "gradient_accumulation_steps", "logging_steps", "save_total_limit", "lora_r")
        check_least(self, 0, "learning_rate", "weight_decay", "max_grad_norm", "eval_steps",
                    "save_steps", "warmup_steps", "max_tokens_per_batch", "max_time",
                    "max_skipped_steps")
        _check(self.max_steps > 0 or self.num_train_epochs > 0, "num_train_epochs",
               self.num_train_epochs, "positive when max_steps is not given")
        for name in ("adam_beta1", "adam_beta2"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "from 0 to below 1")
        _check(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "positive")
        _check(0 < self.ddp_timeout <= limits.SECONDS, "ddp_timeout", self.ddp_timeout,
               f"positive, at most {limits.SECONDS:g}")
        _check(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "from 0 to 1")
        _check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "from 0 to below 1")
        _check(bool(self.train_file), "train_file", self.train_file, "at least one file")
        _check(self.resume_from_checkpoint == "auto" or not self.overwrite_output_dir,
               "resume_from_checkpoint", self.resume_from_checkpoint,
               "auto with --overwrite_output_dir True, which starts from nothing")


@dataclass
class SFTConfig(TrainConfig, InstructConfig):
    """Phase 1, instruct: cross-entropy on the teacher's demonstrations."""

    num_train_epochs: float = 4.0
    """Passes over the training rows."""
    weight_decay: float = 1e-4
    """AdamW weight decay, on matrices only."""
    packing: bool = False
    """Fill rows up to max_length with several examples; attention stays within each example."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(not (self.packing and self.max_tokens_per_batch), "packing", True,
               "False with --max_tokens_per_batch, which packs as well")


@dataclass
class DPOConfig(TrainConfig):
    """Phase 2, self-refine: Direct Preference Optimization on the student's own answers."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"] = "sigmoid"
    """The preference loss."""
    label_smoothing: float = 0.0
    """Assumed share of wrong preferences: cDPO for sigmoid; needed by robust."""
    rpo_alpha: float | None = None
    """Weight of an added NLL term on the chosen completion (mean over its tokens)."""
    precompute_ref_log_probs: bool = True
    """Reference log-probs once, cached in output_dir; False: adapter switched off (use_peft only)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.beta > 0, "beta", self.beta, "positive")
        _check(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing,
               "from 0 to below 0.5")
        _check(self.label_smoothing == 0 or self.loss_type in ("sigmoid", "robust"),
               "label_smoothing", self.label_smoothing, f"0 with --loss_type {self.loss_type}")
        check_least(self, 0, "rpo_alpha")
        _check(self.lora_dropout == 0, "lora_dropout", self.lora_dropout,
               "0: dropout is off in DPO, else policy and reference differ at step 0")
        _check(self.precompute_ref_log_probs or self.use_peft, "precompute_ref_log_probs", False,
               "True without --use_peft: there is no second model to score with")


def check_sampling(s: Any) -> None:
    """Raise InputError for a bad sampling setting, in a GenerateConfig or SamplingParams."""
    _check(0 <= s.temperature < math.inf, "temperature", s.temperature,
           "0 (greedy) or a positive number")
    _check(0 < s.top_p <= 1, "top_p", s.top_p, "above 0 and at most 1 (off)")
    _check(s.top_k >= 0, "top_k", s.top_k, "0 (off) or the number of tokens to keep")
    _check(0 <= s.min_p <= 1, "min_p", s.min_p, "0 (off) to 1 (only the likeliest token)")
    _check(0 < s.repetition_penalty < math.inf, "repetition_penalty", s.repetition_penalty,
           "a positive number; 1 is off")
    _check(all(s.stop_strings), "stop_strings", s.stop_strings, "without an empty string")
    _check(s.max_new_tokens >= 1, "max_new_tokens", s.max_new_tokens, "at least 1")


@dataclass
class GenerateConfig(TemplateConfig, QuestionConfig):
    """Settings shared by sampling and evaluation."""

    model_name_or_path: str
    """Directory in Hugging Face layout, hub id, or .gguf file."""
    output_dir: str
    """Where the completions and run.json go."""
    seed: int = 0
    """Seed of the completions; each has its own random stream, from (seed, id, style, sample)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and cache; logits are always float32."""
    quantization: Literal["none", "int8"] = "none"
    """int8: the blocks' products in int8, on a CPU, of weights and activations (docs/sampling.md)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    engine: Literal["srit", "vllm"] = "srit"
    """srit: our own engine. vllm: vLLM (extra: vllm), in one process, not reproducible bit for bit."""
    num_samples: int = 1
    """Completions per question and prompt style."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already in the prompt or completion become less likely; 1 is off."""
    stop_strings: list[str] = field(default_factory=list)
    """A completion ends before the first of these strings."""
    return_logps: bool = False
    """Write the model's log-probability of every generated token as `logps`."""
    calculator: bool = False
    """Compute what follows an expression and "=", and force it; the rows say where (`forced`)."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    per_device_batch_size: int = 128
    """Sequences that decode together."""
    max_cache_memory: float = 0.0
    """GiB of the KV cache, which may mean fewer sequences together; 0: enough for all."""
    max_time: float = 0.0
    """Minutes after which the run stops; the same command resumes it. 0: no limit."""
    limit: int | None = None
    """Questions per file, the first ones; all by default."""
    overwrite_output_dir: bool = False
    """Delete the run in output_dir and start again; otherwise an unfinished run is resumed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "num_samples", "per_device_batch_size", "limit")
        check_least(self, 0, "max_cache_memory", "max_time")
        _check(self.engine == "srit" or not self.calculator, "engine", self.engine,
               f"srit with --calculator {self.calculator}")
        _check(self.engine == "srit" or self.quantization == "none", "engine", self.engine,
               f"srit with --quantization {self.quantization}")
        check_sampling(self)


@dataclass
class SampleConfig(GenerateConfig):
    """Phase 2: the instructed student answers the questions with and without the CoT prompt."""

    train_file: list[str] = field(default_factory=list)
    """Question files; demonstration files work too."""
    prompt_style: list[PromptStyle] = field(default_factory=lambda: ["direct", "cot"])
    """Prompt styles to answer with."""
    num_samples: int = 4
    """Completions per question and prompt style."""
    temperature: float = 0.7
    """0 is greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.train_file), "train_file", self.train_file, "at least one file")


@dataclass
class EvalConfig(GenerateConfig):
    """Accuracy on questions with ground truth."""

    eval_file: list[str] = field(default_factory=list)
    """Question files."""
    prompt_style: PromptStyle = "cot"
    """Prompt style to answer with."""
    scoring: Literal["generate", "options"] = "generate"
    """generate: the model writes its answer. options: its likeliest option (multiple choice only)."""
    calculator: Literal[False, True, "both"] = False
    """As for sampling. both: without, and with it in results_calculator.json."""
    in_domain: list[str] = field(default_factory=list)
    """Data sets that the student was trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.eval_file), "eval_file", self.eval_file, "at least one file")
        _check(self.engine == "srit" or self.scoring == "generate", "engine", self.engine,
               "srit with --scoring options")
        _check(self.verifier is None or self.scoring == "generate", "verifier", self.verifier,
               "left out with --scoring options, which judges no text")
        _check(not self.calculator or self.scoring == "generate", "calculator", self.calculator,
               "False with --scoring options")


@dataclass
class PairConfig(QuestionConfig):
    """Preference pairs from graded samples."""

    samples_file: list[str]
    """samples.jsonl files."""
    output_dir: str
    """Where pairs.jsonl and run.json go."""
    demos_file: list[str] = field(default_factory=list)
    """Teacher demonstrations, which stand in where the student has no right answer."""
    policy: Literal["paper", "correctness", "mixed", "scored"] = "paper"
    """paper: CoT over direct. correctness: right over wrong CoT. mixed: right CoT over any wrong.
    scored: CoT over CoT that a verifier scores lower by min_margin."""
    min_margin: float = 0.0
    """How much more the chosen answer scores than the rejected one, at least (right: 1, wrong: 0)."""
    pair_prompt: PromptStyle = "cot"
    """Prompt style of the pair's prompt."""
    selection: Literal["uniform", "closest_length"] = "uniform"
    """How pairs are picked when a question offers more than the cap."""
    max_pairs_per_question: int = 1
    """Cap per question."""
    seed: int = 0
    """Seed of the selection."""
    overwrite_output_dir: bool = False
    """Delete what output_dir holds and start afresh."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(0 <= self.min_margin <= 1, "min_margin", self.min_margin, "from 0 to 1")
        _check(self.policy != "scored" or self.min_margin > 0, "min_margin", self.min_margin,
               "above 0 with --policy scored")
        check_least(self, 1, "max_pairs_per_question")
        _check(bool(self.samples_file), "samples_file", self.samples_file, "at least one file")
