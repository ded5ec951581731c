"""Compiles every Triton kernel for a GPU that need not be there, and prints what it takes.

    python tests/aot.py 80 90        one JSON line a kernel and architecture
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srit.kernels import dpo_head_triton, row_pass_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"targets_ptr": "*i64", "cu_ptr": "*i64", "beta": "fp32", "tilt": "fp32"}
VOCABULARIES = [(v, 32 * triton.cdiv(v, 32)) for v in (65, 32003, 49152, 128256, 151936)]  # and stride


def variants():
    """(kernel, dtype of the logits, compile-time constants, launch options)."""
    for dtype in ("bf16", "fp16", "fp32"):
        for vocab, width in VOCABULARIES:
            options = row_pass_triton.launch_options(vocab)
            sizes = {"VOCAB": vocab, "WIDTH": width, "BLOCK": options.pop("BLOCK")}
            yield row_pass_triton.logp_kernel, dtype, sizes, options
            for scaled in (False, True):
                yield row_pass_triton.grad_kernel, dtype, {**sizes, "SCALED": scaled}, options
    block, options = {"BLOCK": dpo_head_triton.BLOCK}, {"num_warps": dpo_head_triton.NUM_WARPS}
    yield dpo_head_triton.segment_sum_kernel, "fp32", block, options
    yield dpo_head_triton.head_backward_kernel, "fp32", block, options
    for shape in (0, 1, 2):
        for average in (False, True):
            constants = {**block, "SHAPE": shape, "AVERAGE": average}
            yield dpo_head_triton.head_kernel, "fp32", constants, options


def build(kernel, dtype: str, constants: dict, options: dict, arch: int) -> dict:
    types = {n: TYPES.get(n, "*" + (dtype if n == "z_ptr" else "fp32")) for n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else t for n, t in types.items()}
    aligned = [(i,) for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    source = ASTSource(
        kernel, signature, constants, attrs={i: [["tt.divisibility", 16]] for i in aligned}
    )
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "dtype": dtype,
        **constants,
        "registers": counts["REG"],
        "spilled": counts["STACK"] + counts["LOCAL"],
        "shared": binary.metadata.shared,
        "widest_access_bits": max(
            int(count or 1) * int(bits)
            for count, bits in re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
        ),
    }


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:]):
        for variant in variants():
            print(json.dumps(build(*variant, arch)), flush=True)
