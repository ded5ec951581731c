"""RMSNorm, gate and rotary embedding: ours, torch's, compiled, and Liger's Triton kernels.

    python benchmarks/bench_layers.py

Forward and backward at the models' layer sizes. Asks one question: would a Triton kernel of our own pay
beside torch.compile? Each must first agree with float64. Writes benchmarks/results/bench_layers_*.csv.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from bench_kernels import device_name, quantile, relative_error, timed
from tables import write_csv
from torch import Tensor

from srit.models.decoder import rotate
from srit.models.ops import gated, rms_norm
from srit.runtime.run_dir import describe

SIZES = {"SmolLM2-135M": (576, 1536, 9), "Llama-3.2-1B": (2048, 8192, 32),
         "Llama-3.1-8B": (4096, 14336, 32)}  # D, intermediate, heads


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)


def gate(a: Tensor, b: Tensor) -> Tensor:
    return gated(a, b, False)


def plain_gate(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.silu(a) * b


def liger(op: str) -> Callable:
    from liger_kernel import ops

    return {"RMSNorm": lambda x, w: ops.rms_norm.LigerRMSNormFunction.apply(x, w, 1e-5),
            "SwiGLU": ops.swiglu.LigerSiLUMulFunction.apply}[op]


def cases(op: str, tokens: int, size: tuple[int, int, int], dtype: torch.dtype, device: str):
    """Inputs of an operation, and the ways to compute it; ours first, plain torch second."""
    d, intermediate, heads = size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    if op == "RMSNorm":
        inputs, ways = (random(tokens, d), random(d)), {"srit": norm, "torch": plain_norm}
    elif op == "SwiGLU":
        inputs = random(tokens, intermediate), random(tokens, intermediate)
        ways = {"srit": gate, "torch": plain_gate}
    else:
        angles = torch.rand(1, tokens, 1, d // heads // 2, device=device) * 100
        cos, sin = angles.cos(), angles.sin()
        inputs, ways = (random(1, tokens, heads, d // heads),), {"srit": lambda x: rotate(x, cos, sin)}
    plain = ways.get("torch", ways["srit"])
    ways["torch.compile"] = torch.compile(plain, dynamic=True)
    if device == "cuda" and importlib.util.find_spec("liger_kernel") and op != "RoPE":
        ways["liger"] = liger(op)
    return inputs, ways, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 16384] if gpu else [1024])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if gpu else ["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    device, rows = "cuda" if gpu else "cpu", []
    machine = describe()
    for name, size in SIZES.items():
        for tokens in args.tokens:
            for dtype_name in args.dtypes:
                for op in ("RMSNorm", "SwiGLU", "RoPE"):
                    dtype = getattr(torch, dtype_name)
                    inputs, ways, plain = cases(op, tokens, size, dtype, device)
                    upstream = torch.randn_like(plain(*inputs))
                    wide = [t.detach().double().requires_grad_() for t in inputs]
                    out = plain(*wide)
                    want = out, *torch.autograd.grad(out, wide, upstream.to(out.dtype))
                    times = {}
                    for way, function in ways.items():
                        def call(f=function, i=inputs, u=upstream):
                            y = f(*i)
                            return y, *torch.autograd.grad(y, i, u)

                        worst = max(map(relative_error, call(), want))
                        if worst > 64 * torch.finfo(dtype).eps:
                            raise SystemExit(f"{op} {way} is off by {worst:.1e} from float64")
                        times[way] = (call, [])
                    for _ in range(args.rounds):
                        for call, values in times.values():
                            values.append(timed(call, device))
                    base = statistics.median(times["srit"][1])
                    for way, (_, values) in times.items():
                        middle = statistics.median(values)
                        rows.append({
                            "op": op, "model": name, "tokens": tokens, "dtype": dtype_name, "way": way,
                            "p20_ms": round(quantile(values, 0.2), 4), "p50_ms": round(middle, 4),
                            "p80_ms": round(quantile(values, 0.8), 4),
                            "ratio_to_ours": round(middle / base, 2), "device": device_name(),
                            "torch": torch.__version__, "commit": machine["commit"]})
                        print("{op:8} {model:13} {tokens:6} {dtype:9} {way:14} {p50_ms:9.3f} ms "
                              "{ratio_to_ours:6.2f}x".format(**rows[-1]), flush=True)
    slug = device_name().replace(" ", "-") if gpu else "cpu"
    write_csv(rows, Path(__file__).parent / f"results/bench_layers_{slug}.csv")


if __name__ == "__main__":
    main()
