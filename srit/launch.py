"""From the command line to a stage: flags and YAML become a config, errors become one line.

A YAML file is flags written down: both go through the same parser (tyro, which reads types, defaults
and help from the dataclasses). Flags win over YAML.
"""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import tyro
from safetensors import SafetensorError

from srit.recipe import check_keys, keys_of, read_yaml, stage_values
from srit.runtime import distributed, shutdown
from srit.runtime.files import InputError

# What gloo and NCCL say when a peer is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out",
        "timed out", "NCCL error", "Socket closed")
Config = TypeVar("Config")


def to_flags(values: dict[str, Any]) -> list[str]:
    """Config values as command-line words. None keeps the default."""
    words = []
    for key, value in values.items():
        if value is None:
            continue
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def parse(cls: type[Config], stage: str, argv: list[str] | None = None) -> Config:
    """Flags, and a YAML file or the stage's part of a recipe given by --config, as a config object."""
    words: list[str] = []  # `--key=value` split, so that every flag stands alone
    for word in sys.argv[1:] if argv is None else argv:
        words += word.split("=", 1) if word.startswith("--") and "=" in word else [word]
    values: dict[str, Any] = {}
    if "--config" in words and "config" not in keys_of(cls):  # `srit run` reads its recipe itself
        at = words.index("--config")
        if at + 1 == len(words):
            raise InputError("--config: name a YAML file")
        path = words[at + 1]
        del words[at : at + 2]
        values = read_yaml(path)
        if "data" in values or stage in values:
            values = stage_values(path, stage)
        check_keys(values, keys_of(cls), path)
    flags = [word[2:] for word in words if word.startswith("--") and word != "--help"]
    check_keys(flags, keys_of(cls), "command line")
    booleans = {f.name for f in dataclasses.fields(cls) if f.type is bool}
    for at in reversed(range(len(words))):  # a bare `--packing` means True
        bare = at + 1 == len(words) or words[at + 1].startswith("--")
        if words[at][2:] in booleans and bare:
            words.insert(at + 1, "True")
    words = to_flags({k: v for k, v in values.items() if k not in flags}) + words
    return tyro.cli(cls, args=words, prog=f"srit {stage}", use_underscores=True,
                    config=(tyro.conf.FlagConversionOff,))


def run(cls: type[Config], stage: str, main: Callable[[Config], None],
        argv: list[str] | None = None) -> None:
    """Parse and run one stage. Bad input ends it with one line and exit status 1."""
    try:
        cfg = parse(cls, stage, argv)
        # What has no max_time does not ask whether it should stop: Ctrl-C ends it where it is.
        with shutdown.listening(cfg.max_time) if hasattr(cfg, "max_time") else nullcontext():
            main(cfg)
    except shutdown.Stopped as reason:
        if distributed.rank() == 0:
            print(reason)
        distributed.shutdown()
    except (InputError, OSError, SafetensorError) as error:  # OSError: no space, no permission, ...
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU.
        text = str(error)
        if any(sign in text for sign in LOST):
            sys.exit(f"error: rank {distributed.rank()}: another rank has died or does not answer "
                     f"({text.splitlines()[0]}); its own message says why. The same command goes on "
                     "from the last checkpoint")
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        sys.exit(f"error: out of memory ({text.splitlines()[0]}). Training: lower "
                 "--max_tokens_per_batch or --per_device_train_batch_size (and raise "
                 "--gradient_accumulation_steps), or add --gradient_checkpointing True. Sampling and "
                 "evaluation: lower --per_device_batch_size")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where it stopped")
