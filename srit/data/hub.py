"""Data sets on the Hub: which files of a repository are a split, and their download.

As in the datasets library these are the files that `configs` of the README names, else those that are
called like the split.
"""

import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from srit.data.file_formats import FORMATS, suffix
from srit.runtime.files import InputError

REVISION = r"(?:@(?P<revision>(?:refs/(?:convert|pr)/)?[^/:@]+))?"
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
HUB_SET = re.compile(rf"{NAME}(?:/(?P<config>[\w.-]+))?{REVISION}:(?P<split>[\w.-]+)")
HUB_FILE = re.compile(rf"hf://datasets/{NAME}{REVISION}/(?P<file>[^@]+)")
SHARD = re.compile(r"-\d{5}-of-(\d{5})")


@cache
def hub_file(source: str, name: str, revision: str | None, file: str) -> Path:
    """One file. `source` is what the user wrote, for messages."""
    return Path(_ask_hub(source, "hf_hub_download", name, file, revision=revision))


@cache  # a name is one commit for a whole process
def hub_files(source: str, name: str, config: str | None, revision: str | None,
               split: str) -> list[Path]:
    """The files of a split. A config that no README names is a folder. Without network they are those
    of the last download. Raises InputError if there are none, or fewer than their names count."""
    def download(revision: str | None, patterns: list[str]) -> Path:
        # These patterns are fnmatch's, to which ** is * and needs the slash.
        return Path(_ask_hub(source, "snapshot_download", name, revision=revision,
                             allow_patterns=[*patterns, *(p.replace("**/", "") for p in patterns)]))

    readme = download(revision, ["README.md"]) / "README.md"
    patterns = _card_patterns(source, readme, config, split)
    if patterns is None:
        folder = download(readme.parent.name, [f"*{split}*"]) / (config or "")
        called = re.compile(rf"(.*[-._ 0-9/])?{re.escape(split)}([-._ 0-9/].*)?")
        files = [file for file in folder.rglob("*")
                 if called.fullmatch(file.relative_to(folder).as_posix())]
    else:
        folder = download(readme.parent.name, patterns)
        files = [file for pattern in patterns for file in folder.glob(pattern)]
    files = sorted({file for file in files if file.is_file() and suffix(file) in FORMATS})
    if not files:
        raise InputError(f"{source}: no file of that split in a format that is read "
                         f"({' '.join(FORMATS)}); name one with hf://datasets/{name}/FILE")
    for file in files:
        if (shard := SHARD.search(file.name)) and int(shard[1]) > len(files):
            raise InputError(f"{source}: {len(files)} of {int(shard[1])} files are there; without "
                             "network only those of the last download are")
    return files


def _card_patterns(source: str, readme: Path, config: str | None, split: str) -> list[str] | None:
    """The patterns of the split's files that the README names; None if it names none at all."""
    if not readme.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(readme) or {}
        configs = {entry["config_name"]: entry for entry in card.get("configs") or ()
                   if entry.get("data_files")}
        if not configs:
            return None
        chosen = config or next((n for n, entry in configs.items() if entry.get("default")), "default")
        if chosen not in configs and (config or len(configs) > 1):
            raise InputError(f"{source}: its configs are {sorted(map(str, configs))}; write one behind "
                             "the name, OWNER/NAME/CONFIG")
        files = (configs.get(chosen) or next(iter(configs.values())))["data_files"]
        entries = [entry if isinstance(entry, dict) else {"split": "train", "path": entry}
                   for entry in ([files] if isinstance(files, str) else files)]
        patterns = [path for entry in entries if entry["split"] == split
                    for path in ([entry["path"]] if isinstance(entry["path"], str) else entry["path"])]
        splits = sorted({entry["split"] for entry in entries})
        valid = all(map(_is_inside, map(PurePosixPath, patterns)))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise InputError(f"{source}: {readme} does not name its files as the Hub's documentation says")
    if not patterns:
        raise InputError(f"{source}: has the splits {splits}")
    return patterns


def _is_inside(pattern: PurePosixPath) -> bool:
    """Whether it is a pattern of pathlib's glob that stays in the folder."""
    return bool(pattern.parts) and not pattern.is_absolute() and not any(
        part == ".." or ("**" in part and part != "**") for part in pattern.parts)


def _ask_hub(source: str, function: str, *arguments: Any, **keywords: Any) -> str:
    import huggingface_hub

    try:
        return getattr(huggingface_hub, function)(*arguments, repo_type="dataset", **keywords)
    except Exception as error:  # no network, no such repository, no such file, no permission
        raise InputError(f"{source}: {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:300]}") from None
