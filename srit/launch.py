"""Parse flags and YAML into a config, run a stage, and report its errors in one line.

YAML values become flags, so both go through one parser: tyro, which takes types, defaults and help
from the dataclasses.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import tyro
from safetensors import SafetensorError

from srit.help import print_help
from srit.recipe import check_keys, keys_of, read_yaml, stage_values
from srit.runtime import shutdown
from srit.runtime.files import InputError
from srit.runtime.outcome import (
    BAD_INPUT,
    DIVERGED,
    FAILED,
    FINISHED,
    STOPPED,
    Diverged,
    Failed,
    Finished,
    Stopped,
)

# Parts of gloo's and NCCL's messages when a peer is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out",
        "timed out", "NCCL error", "Socket closed")
MAPPINGS = ("instruction", "prompt_template", "chat_template_kwargs")  # flags: key value key value ...
Config = TypeVar("Config")


def to_flags(values: dict[str, Any]) -> list[str]:
    """Settings as command-line words; None is left out, so that the default applies.

    Raises InputError for a setting of names and values that is none.
    """
    words = []
    for key, value in values.items():
        if key in MAPPINGS and not isinstance(value, list | None):
            if not isinstance(value, dict) or not all(
                    isinstance(item, str | int | float) for item in value.values()):
                raise InputError(f"{key}: expected a mapping of names to plain values, got {value!r}")
            value = [word for pair in value.items() for word in pair]
        if value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _split(words: list[str]) -> dict[str, list[str]]:
    """{key: values} of `--key value ...`, `--key=value` and a bare `--key`."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if key in flags:
                raise InputError(f"command line: --{key} stands twice; give it all its values at once")
            flags[key] = [value] if equals else []
        elif flags:
            flags[key].append(word)
        else:
            raise InputError(f"command line: expected a flag such as --output_dir, got {word!r}")
    return flags


def parse(cls: type[Config], stage: str, argv: list[str] | None = None) -> Config:
    """The stage's config from flags and the YAML file or recipe given by --config. Flags win.

    Raises InputError for an unknown key and names the nearest known one.
    """
    words, known, settings = sys.argv[1:] if argv is None else argv, keys_of(cls), {}
    if {"-h", "--help"} & set(words):
        print_help(cls, f"srit {stage}")
    named = "file" not in known or not words or words[0].startswith("--")
    flags = _split(words if named else ["--file", *words])  # srit show FILE
    if "config" in flags and "config" not in known:  # `srit run` reads its recipe itself
        if len(flags["config"]) != 1:
            raise InputError("--config: name a YAML file")
        (path,) = flags.pop("config")
        settings = read_yaml(path)
        if "data" in settings or stage in settings:
            values = stage_values(path, "sft" if stage == "show" else stage)
            settings = {key: value for key, value in values.items() if key in known}
        check_keys(settings, known, path)
    check_keys(flags, known, "command line")
    for field in dataclasses.fields(cls):
        if field.type is bool and flags.get(field.name) == []:
            flags[field.name] = ["True"]
    settings |= flags
    words = to_flags(settings)
    cfg = tyro.cli(cls, args=words, prog=f"srit {stage}", use_underscores=True,
                   config=(tyro.conf.FlagConversionOff,))
    for name in settings:
        if name.startswith("lora_") and not cfg.use_peft:
            raise InputError(f"--{name}: add --use_peft True, or there is no adapter")
    for name, value in vars(cfg).items():
        if name == "output_dir" and value == "":
            raise InputError("--output_dir: is empty; name a directory")
        if isinstance(value, str) and value.partition("/")[0] == "~":
            raise InputError(f"--{name} {value}: only a shell knows ~, and not behind = or in a file; "
                             "write the whole path")
    return cfg


def run(cls: type[Config], stage: str, main: Callable[[Config], None],
        argv: list[str] | None = None) -> None:
    """Parse the command line and run one stage; exit with a status of runtime/outcome.py."""
    cfg = None
    try:
        cfg = parse(cls, stage, argv)
        # A stage without max_time never checks for a shutdown, so Ctrl-C must interrupt it directly.
        with shutdown.listening(cfg.max_time) if hasattr(cfg, "max_time") else nullcontext():
            shutdown.end_with_parent()
            main(cfg)
            print(end="", flush=True)
    except BrokenPipeError as error:
        if cfg is not None and stage != "show":
            _exit(FAILED, f"error: {error}")
        # `| head` has read what it wanted. Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except (Finished, Stopped) as reason:
        from srit.runtime import distributed  # here, because it imports torch

        if distributed.rank() == 0:
            print(reason, flush=True)
            if isinstance(reason, Stopped) and getattr(cfg, "overwrite_output_dir", False):
                print("leave out --overwrite_output_dir then: it would start from nothing", flush=True)
        distributed.leave_process_group()
        sys.exit(STOPPED if isinstance(reason, Stopped) else FINISHED)
    except InputError as error:
        _exit(BAD_INPUT, f"error: {error}")
    except Diverged as error:
        _exit(DIVERGED, f"error: {error}")
    except (Failed, OSError, SafetensorError) as error:  # the last two: disk full, no permission, ...
        _exit(FAILED, f"error: {error}")
    except RuntimeError as error:
        # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU.
        text = str(error)
        if any(sign in text for sign in LOST):
            from srit.runtime import distributed

            _exit(FAILED, f"error: rank {distributed.rank()}: another rank has died or does not answer "
                          f"({text.splitlines()[0]}); see that rank's own message. The same command, "
                          "with --resume_from_checkpoint auto (the default), resumes from the last "
                          "checkpoint")
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        _exit(FAILED, f"error: out of memory ({text.splitlines()[0]}). Training: lower "
                      "--max_tokens_per_batch or --per_device_train_batch_size (and raise "
                      "--gradient_accumulation_steps), or add --gradient_checkpointing True. Sampling "
                      "and evaluation: lower --per_device_batch_size")
    except KeyboardInterrupt:
        _exit(STOPPED, "interrupted; give the same command again")


def _exit(status: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)
