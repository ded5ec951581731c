"""`--help` of a command, in groups: what is used most first. tyro prints it."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Annotated

import tyro

MOST_USED = ("file", "model", "base_url", "model_name_or_path", "train_file", "eval_file",
             "samples_file", "demos_file", "output_dir", "beta", "learning_rate", "num_train_epochs",
             "per_device_train_batch_size", "max_length", "use_peft", "num_samples", "temperature",
             "max_new_tokens", "policy", "seed")
GROUPS = {
    "model": ("dtype", "quantization", "device", "engine", "max_cache_memory", "per_device_batch_size",
              "torch_compile", "parallel", "ddp_timeout"),
    "data": ("limit", "shuffle_dataset", "packing", "parse_special_tokens", "filter_demos",
             "drop_false_equations", "verifier", "allow_code_execution", "in_domain", "scoring"),
    "prompts": ("prompt_style", "pair_prompt", "instruction", "prompt_template", "cot_suffix",
                "system_prompt", "chat_template_kwargs", "date"),
    "pairs": ("min_margin", "selection", "max_pairs_per_question"),
    "sampling": ("num_samples", "top_p", "top_k", "min_p", "repetition_penalty", "stop_strings",
                 "calculator", "return_logps"),
    "optimization": ("seed", "max_steps", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
                     "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
                     "max_tokens_per_batch", "gradient_accumulation_steps", "gradient_checkpointing",
                     "checkpoint_policy", "loss_type", "label_smoothing", "rpo_alpha",
                     "precompute_ref_log_probs"),
    "LoRA": ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "checkpoints": ("save_steps", "save_total_limit", "async_save", "load_best_model_at_end",
                    "resume_from_checkpoint", "overwrite_output_dir", "max_time",
                    "max_skipped_steps"),
    "logging": ("logging_steps", "eval_steps", "per_device_eval_batch_size"),
}
CONFIG = "YAML file of these settings, or a recipe; flags win."
SHORT = 12  # so many flags need no groups


def print_help(cls: type, prog: str) -> None:
    """Print the flags of a config class, the ten most used ones first, and exit with status 0."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    texts = {}
    for parent in reversed(cls.__mro__[:-1]):
        texts |= _texts(parent)
    left = dict.fromkeys(fields)
    groups = {"": [name for name in MOST_USED if name in fields][:10]} | GROUPS | {"other": fields}
    if len(fields) <= SHORT:
        groups = {"": fields}
    parts = []
    if "config" not in fields:
        help_of_config = Annotated[str, tyro.conf.arg(help=CONFIG)]
        parts.append(("config", help_of_config, dataclasses.field(default="")))
    for title, names in groups.items():
        part = [(name, _described(fields[name], texts[name]),
                 dataclasses.field(default=fields[name].default,
                                   default_factory=fields[name].default_factory))
                for name in names if name in left]
        left = {name: None for name in left if name not in names}
        if title and part:
            parts.append((title, dataclasses.make_dataclass(title, part, kw_only=True)))
        else:
            parts += part
    tyro.cli(dataclasses.make_dataclass("Help", parts, kw_only=True), args=["--help"], prog=prog,
             description=inspect.cleandoc(cls.__doc__), use_underscores=True,
             config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes))


def _described(field: dataclasses.Field, text: str) -> type:
    """The field's type, for tyro, with its text."""
    hint = None
    if field.default_factory in (list, dict):  # tyro would write "(default: )"
        hint = "" if "by default" in text.lower() else "(default: none)"
    return Annotated[field.type, tyro.conf.arg(help=text, help_behavior_hint=hint)]


def _texts(cls: type) -> dict[str, str]:
    """The docstring behind each field that the class itself has."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    return {one.target.id: inspect.cleandoc(two.value.value)
            for one, two in zip(tree.body, tree.body[1:], strict=False)
            if isinstance(one, ast.AnnAssign) and isinstance(two, ast.Expr)}
