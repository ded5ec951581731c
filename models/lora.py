"""LoRA added to an existing model: W x + (alpha / r) B A x, W frozen, B initially zero.

Source: Hu et al. 2021, arXiv 2106.09685. Adapters are saved in PEFT's layout.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srit.models.decoder import Decoder, Linear
from srit.models.sharded import copy_full_tensor, full_tensor
from srit.runtime.files import InputError, atomic_path, atomic_write
from srit.runtime.limits import INTEGER, NUMBER, check, is_integer, read_object

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


class LoRALinear(Linear):
    """A linear layer with an adapter; `weight` and `bias` keep their names in checkpoints.

    A and B are float32, whatever the dtype of `weight`.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        fp32 = {"dtype": torch.float32, "device": device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **fp32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout, self.enabled = alpha / r, nn.Dropout(dropout), True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.enabled:
            return out
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return out + self.scale * F.linear(low, self.lora_B.to(x.dtype))


def _adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The A and B matrices of all adapters."""
    for _, module in _adapters(model):
        yield from (module.lora_A, module.lora_B)


def add_lora(model: Decoder, r: int = 16, alpha: float = 32, dropout: float = 0.0,
             target_modules: Sequence[str] | None = None) -> None:
    """Freeze the model and add an adapter to every linear layer named in `target_modules`, in place.

    By default these are all projections of attention and MLP. B is zero, so logits do not change.
    Raises InputError if r < 1, if no linear layer has a name, or if the model has an adapter already.
    """
    if r < 1:
        raise InputError(f"lora_r {r}: must be at least 1")
    if next(lora_parameters(model), None) is not None:
        raise InputError("the model has an adapter already; merge it first")
    targets = tuple(target_modules or TARGETS)
    linear = [n for n, m in model.named_modules() if isinstance(m, Linear)]
    for target in targets:
        if not any(name.split(".")[-1] == target for name in linear):
            have = sorted({name.split(".")[-1] for name in linear})
            raise InputError(f"lora_target_modules: no module '{target}'; there are {have}")
    model.requires_grad_(False)
    for name in linear:
        parent, _, child = name.rpartition(".")
        if child in targets:
            owner = model.get_submodule(parent)
            setattr(owner, child, LoRALinear(getattr(owner, child), r, alpha, dropout))


@torch.no_grad()
def _merged(module: LoRALinear) -> Tensor:
    delta = module.scale * (full_tensor(module.lora_B).float() @ full_tensor(module.lora_A).float())
    return (full_tensor(module.weight).float() + delta).to(module.weight.dtype)


def merged_parameters(model: Decoder) -> Iterator[tuple[str, nn.Parameter, Callable[[], Tensor]]]:
    """(name, parameter, function that gives its full value with the adapter merged).

    Adapters' own parameters are left out. With a sharded model every rank must call the function.
    """
    adapted = {f"{name}.weight": module for name, module in _adapters(model)}
    for name, parameter in model.named_parameters():
        if name in adapted:
            yield name, parameter, partial(_merged, adapted[name])
        elif not name.endswith((".lora_A", ".lora_B")):
            yield name, parameter, partial(full_tensor, parameter)


def merge(model: Decoder) -> None:
    """Merge every adapter into its weight, in float32, and remove it; all parameters train again."""
    for name, module in list(_adapters(model)):
        parent, _, child = name.rpartition(".")
        merged = _merged(module)
        plain = Linear(module.in_features, module.out_features, bias=module.bias is not None,
                       device="meta")
        plain.weight, plain.bias = nn.Parameter(merged), module.bias
        setattr(model.get_submodule(parent), child, plain)
    model.requires_grad_(True)


@contextmanager
def disabled(model: Decoder) -> Iterator[None]:
    """Within the block the model is its base: the reference model of DPO."""
    modules = [module for _, module in _adapters(model)]
    if not modules:
        raise InputError("the model has no adapter to switch off")
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def save_adapter(model: Decoder, directory: str | Path | None,
                 base_model_name_or_path: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does.

    Every rank of a sharded model calls this; those that write nothing pass None as the directory.
    """
    adapters = dict(_adapters(model))
    first = next(iter(adapters.values()))
    r = len(first.lora_A)
    tensors = {}
    for name, module in adapters.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = full_tensor(module.lora_A).cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = full_tensor(module.lora_B).cpu().contiguous()
    if directory is None:
        return
    directory = Path(directory)
    with atomic_path(directory / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": r,
        "lora_alpha": first.scale * r,
        "lora_dropout": first.dropout.p,
        "target_modules": sorted({name.split(".")[-1] for name in adapters}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_write(directory / "adapter_config.json") as handle:
        json.dump(config, handle, indent=2)
        handle.write("\n")


def load_adapter(model: Decoder, directory: str | Path) -> None:
    """Load an adapter in PEFT's layout; a model without adapters gets them first.

    Raises InputError for a damaged file, an unsupported kind of adapter, or one of another model.
    """
    directory = Path(directory)
    config = read_object(directory / "adapter_config.json")
    file = directory / "adapter_model.safetensors"
    if not file.is_file():  # reading a pipe may never end
        raise InputError(f"{file}: no such file")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory}: no readable adapter ({error})") from None
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise InputError(f"{directory}: peft_type {config.get('peft_type')!r} with bias "
                         f"{config.get('bias')!r}; only LORA with bias 'none' is supported")
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise InputError(f"{directory}: adapter_config.json sets {key}, which is not supported")
    if next(lora_parameters(model), None) is None:
        r, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
        dropout, where = config.get("lora_dropout", 0.0), str(directory / "adapter_config.json")
        check(is_integer(r, 1, INTEGER), where, "r", r, "an integer, at least 1")
        check(isinstance(alpha, int | float) and abs(alpha) <= NUMBER, where, "lora_alpha", alpha,
              f"a number, at most {NUMBER:g}")
        check(isinstance(dropout, int | float) and 0 <= dropout <= 1, where, "lora_dropout", dropout,
              "from 0 to 1")
        check(isinstance(targets, list) and all(isinstance(name, str) for name in targets), where,
              "target_modules", targets, "a list of names")
        add_lora(model, r, alpha, dropout, targets)
    for name, module in _adapters(model):
        for matrix in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{matrix}.weight"
            found, parameter = tensors.pop(key, None), getattr(module, matrix)
            if found is None:
                raise InputError(f"{directory}: missing tensor {key}")
            if found.shape != parameter.shape:
                raise InputError(f"{directory}: tensor {key} has shape {tuple(found.shape)}, the "
                                 f"model asks for {tuple(parameter.shape)}")
            copy_full_tensor(parameter, found)
    if tensors:
        raise InputError(f"{directory}: unexpected tensor {next(iter(tensors))}")
