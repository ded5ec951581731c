"""Compiles every Triton kernel and prints the resources it takes; no GPU needed.

    python tests/kernels/aot.py 80 90        one JSON line per kernel variant and architecture
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srit.kernels import paged_attention_triton, pair_head_triton, row_softmax_triton, scoring_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"targets_ptr": "*i64", "cu_ptr": "*i64", "n": "i32", "W": "i32", "scale": "fp32",
         **dict.fromkeys(("pages_ptr", "starts_ptr", "lengths_ptr"), "*i32")}
FLOATS = ("beta", "smoothing_slope", "rpo_alpha")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = [(v, 32 * triton.cdiv(v, 32)) for v in (65, 32003, 49152, 128256, 151936)]  # and stride
# (key/value heads, queries of each, head size): SmolLM2-135M, Llama-3.2-1B, Qwen2.5-1.5B, Gemma 3
ATTENTION = [(3, 3, 64), (8, 4, 64), (2, 6, 128), (1, 4, 256)]
# (vocabulary, D): less than a tile, one that no block divides, SmolLM2-135M, Llama-3.2-1B, Qwen2.5-7B
HEADS = [(255, 64), (32003, 896), (49152, 576), (128256, 2048), (152064, 3584)]
ACCESS = r"(?:ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)"  # groups: elements, bits of one


class Variant(NamedTuple):
    kernel: Any
    dtype: str  # of the logits, or of hidden and weight
    constants: dict[str, Any]
    options: dict[str, int]
    descriptors: dict[str, str] = {}  # noqa: RUF012


def variants(arch: int) -> Iterator[Variant]:
    """All that the operations launch on this architecture."""
    for dtype in DTYPES:
        # bf16 stands for all: other vocabularies change constants, fp16 changes a conversion.
        for vocab, width in VOCABULARIES if dtype == "bf16" else VOCABULARIES[1:3]:
            yield from row_softmax_variants(dtype, vocab, width)
        for vocab, d in HEADS if dtype == "bf16" else HEADS[1:3]:
            yield from scoring_variants(dtype, vocab, d, arch)
        for heads in ATTENTION if dtype == "bf16" else ATTENTION[:1]:
            yield from paged_attention_variants(dtype, *heads)
        options = {"num_warps": 8}
        yield Variant(row_softmax_triton.multiply_kernel, dtype, {"BLOCK": row_softmax_triton.BLOCK},
                      options)
    block, options = {"BLOCK": pair_head_triton.BLOCK}, {"num_warps": pair_head_triton.NUM_WARPS}
    yield Variant(pair_head_triton.segment_sum_kernel, "fp32", block, options)
    for shape in (0, 1, 2):
        for average in (False, True):
            constants = {**block, "SHAPE": shape, "AVERAGE": average}
            yield Variant(pair_head_triton.head_kernel, "fp32", constants, options)


def row_softmax_variants(dtype: str, vocab: int, width: int) -> Iterator[Variant]:
    options = row_softmax_triton.launch_options(vocab)
    sizes = {"VOCAB": vocab, "WIDTH": width, "BLOCK": options.pop("BLOCK")}
    for coef in (False, True):
        yield Variant(row_softmax_triton.grad_kernel, dtype, {**sizes, "HAS_COEF": coef}, options)
    for stats, grad in ((False, False), (True, False), (False, True), (True, True)):
        flags = {"STATS": stats, "GRAD": grad, "HAS_COEF": grad}
        yield Variant(row_softmax_triton.logp_kernel, dtype, {**sizes, **flags}, options)


def scoring_variants(dtype: str, vocab: int, d: int, arch: int) -> Iterator[Variant]:
    launch = scoring_triton.launch_options(arch, DTYPES[dtype])
    blocks = {k: v for k, v in launch.items() if k.startswith("BLOCK")}
    options = {k: v for k, v in launch.items() if not k.startswith("BLOCK")}
    tile = {m: f"tensordesc<{dtype}[{blocks[m]}, {blocks['BLOCK_K']}]>" for m in ("BLOCK_M", "BLOCK_N")}
    sizes = {"VOCAB": vocab, "D": d, "SLICES": scoring_triton.SLICES}
    for tma in (False, True) if arch >= 90 else (False,):
        constants = {**sizes, **blocks, "TMA": tma, "WIDEN": False, "GROUP_M": scoring_triton.GROUP_M}
        descriptors = {"x": tile["BLOCK_M"], "w": tile["BLOCK_N"]} if tma else {}
        yield Variant(scoring_triton.partials_kernel, dtype, constants, options, descriptors)
    merge = {**sizes, "BLOCK": scoring_triton.DOT_BLOCK}
    yield Variant(scoring_triton.merge_kernel, dtype, merge, {"num_warps": 4})


def paged_attention_variants(dtype: str, kv_heads: int, group: int, size: int) -> Iterator[Variant]:
    for window in (0, 512):
        constants = {"WINDOW": window, "PAGE": 32, "WIDEN": False,
                     **paged_attention_triton.shape_constants(kv_heads, group, size)}
        yield Variant(paged_attention_triton.paged_attention_kernel, dtype, constants, {"num_warps": 4})


def argument_type(name: str, variant: Variant) -> str:
    if name in variant.constants:
        return "constexpr"
    if name in variant.descriptors:
        return variant.descriptors[name]
    if name in FLOATS:
        return "fp32"
    wide = {"logits_ptr", "x_ptr", "w_ptr", "x", "w", "q_ptr", "keys_ptr", "values_ptr", "out_ptr"}
    return TYPES.get(name, "*" + (variant.dtype if name in wide else "fp32"))


def build(variant: Variant, arch: int) -> dict:
    kernel, constants = variant.kernel, variant.constants
    signature = {name: argument_type(name, variant) for name in kernel.arg_names}
    aligned = [(i,) for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    source = ASTSource(
        kernel, signature, constants, attrs={i: [["tt.divisibility", 16]] for i in aligned}
    )
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = binary.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "dtype": variant.dtype,
        **constants,
        "registers": counts["REG"],
        "spilled": counts["STACK"] + counts["LOCAL"],
        "shared": binary.metadata.shared,
        "widest_access_bits": max(
            [0] + [int(count or 1) * int(bits) for count, bits in re.findall(ACCESS, ptx)]
        ),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "mma": ptx.count("mma.sync"),
    }


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:]):
        for variant in variants(arch):
            print(json.dumps(build(variant, arch)), flush=True)
