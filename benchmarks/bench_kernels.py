"""The linear head against its peers: correct first, then time and memory.

    python benchmarks/bench_kernels.py                  everything this device can do
    python benchmarks/bench_kernels.py --plot FILE.csv  figures and a Markdown table from a CSV

Stages: `score` (log-probs, no gradient), `train` (mean NLL, forward and backward), `frozen` (the same
under a frozen head), `dpo` (preference loss of pairs with prompts as long as completions). Every
contender must first agree with float64. The roofline is measured: the bare GEMMs of the stage, on a
chunk of rows, in the same dtype. CPU contenders take turns, so that a noisy machine hits all alike.
Peak memory is what a call takes beyond what was there before. Peers that are not installed are named
and left out. Writes benchmarks/results/bench_kernels_<device>.csv after every shape.
"""

import argparse
import csv
import gc
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tables import pyplot, write_csv
from torch import Tensor

from srit.kernels import dpo_loss, linear_dpo, linear_logp, linear_nll, segment_sum
from srit.kernels.chunks import chunk_limit
from srit.kernels.linear_logp import linear_logp_ref
from srit.runtime.run_dir import describe

MODELS = {  # D, V
    "SmolLM2-135M": (576, 49152),
    "Llama-3.2-1B": (2048, 128256),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3.1-8B": (4096, 128256),
}
GEMMS = {"score": 1, "train": 3, "frozen": 2, "dpo": 3}
OURS = {"score": "srit", "train": "srit linear_nll", "frozen": "srit linear_nll",
        "dpo": "srit linear_dpo"}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative Frobenius error against float64
BETA = 0.1


@dataclass
class Problem:
    """N rows to score out of `hidden`; for `dpo`, sequences of equal length, prompt and completion."""

    stage: str
    hidden: Tensor  # (N, D), or (2B, T, D) for dpo
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,), or (2B, T) for dpo: the token that position t predicts
    rows: Tensor | None = None  # dpo: the completions' positions in the flattened hidden
    cu_seqlens: Tensor | None = None
    ref: Tensor | None = None  # (2B,)

    @property
    def scored(self) -> int:
        return len(self.targets) if self.rows is None else len(self.rows)


def make_problem(stage: str, n: int, d: int, vocab: int, dtype: torch.dtype, device: str) -> Problem:
    """Random hidden states of unit size, weights that give logits of a few units."""
    torch.manual_seed(n + d)
    trained = stage != "score"
    weight = (torch.randn(vocab, d, device=device) * 2 / d**0.5).to(dtype)
    weight.requires_grad_(trained and stage != "frozen")
    if stage != "dpo":
        hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_(trained)
        return Problem(stage, hidden, weight, torch.randint(0, vocab, (n,), device=device))
    length = min(512, n)  # half of it prompt
    sequences = 2 * max(1, n // length)
    hidden = torch.randn(sequences, length, d, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (sequences, length), device=device)
    half = torch.arange(length // 2, length, device=device)
    rows = (torch.arange(sequences, device=device)[:, None] * length + half).flatten()
    cu = torch.arange(0, len(rows) + 1, len(half), dtype=torch.int32)
    ref = torch.randn(sequences, device=device) - 8.0 * len(half)
    return Problem(stage, hidden, weight, targets, rows, cu, ref)


def selective_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """TRL's, where it is installed; else the same operations."""
    if importlib.util.find_spec("trl") is not None:
        from trl.trainer.utils import selective_log_softmax as theirs

        return theirs(logits, targets)
    if logits.dtype == torch.float32:
        chosen = logits.gather(-1, targets[..., None])[..., 0]
        return chosen - torch.stack([row.logsumexp(-1) for row in logits])
    parts = [F.log_softmax(z, -1).gather(-1, t[..., None])[..., 0]
             for z, t in zip(logits, targets, strict=True)]
    return torch.stack(parts)


def eager(p: Problem) -> Tensor:
    logps = linear_logp_ref(p.hidden, p.weight, p.targets)
    return logps if p.stage == "score" else -logps.mean()


def selective(p: Problem) -> Tensor:
    # One "sequence" of all rows: the loop of the 16-bit branch goes over sequences.
    logps = selective_log_softmax(F.linear(p.hidden, p.weight)[None], p.targets[None])[0]
    return logps if p.stage == "score" else -logps.mean()


_compiled = torch.compile(linear_logp_ref)


def compiled(p: Problem) -> Tensor:
    logps = _compiled(p.hidden, p.weight, p.targets)
    return logps if p.stage == "score" else -logps.mean()


def torch_chunked(p: Problem) -> Tensor:
    # Its own choice of chunk is many times slower on a CPU, and its sums in bf16 too coarse.
    rows = min(p.scored, chunk_limit(p.hidden, len(p.weight), None))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, acc_policy="accurate")
    return F.linear_cross_entropy(p.hidden, p.weight, p.targets, options=options)


def liger(p: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(p.weight, p.hidden, p.targets)


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.hidden, p.weight, p.targets)


def ours_nll(p: Problem) -> Tensor:
    return linear_nll(p.hidden, p.weight, p.targets, scale=1 / len(p.targets))


def ours_stash(p: Problem) -> Tensor:
    return -linear_logp(p.hidden, p.weight, p.targets, path="gemm", stash_bytes=1 << 62).mean()


def ours_recompute(p: Problem) -> Tensor:
    return -linear_logp(p.hidden, p.weight, p.targets, path="gemm", stash_bytes=0).mean()


def ours_gemm(p: Problem) -> Tensor:
    return linear_logp(p.hidden, p.weight, p.targets, path="gemm")


def ours_fused(p: Problem) -> Tensor:
    return linear_logp(p.hidden, p.weight, p.targets, path="fused")


def pair_loss(sums: Tensor, ref: Tensor) -> Tensor:
    return dpo_loss(sums[0::2], sums[1::2], ref[0::2], ref[1::2], BETA)[0].sum()


def trl_all_rows(p: Problem) -> Tensor:
    """Head over prompts too, then mask: TRL's trainer without Liger."""
    logps = selective_log_softmax(F.linear(p.hidden, p.weight), p.targets)
    mask = torch.zeros(p.targets.numel(), device=logps.device)
    mask[p.rows] = 1
    return pair_loss((logps * mask.view_as(logps)).sum(1), p.ref)


def eager_completions(p: Problem) -> Tensor:
    x, targets = p.hidden.flatten(0, 1)[p.rows], p.targets.flatten()[p.rows]
    return pair_loss(linear_logp_ref(x, p.weight, targets).view(len(p.ref), -1).sum(1), p.ref)


def liger_dpo(p: Problem) -> Tensor:
    """It has no cached reference: its loss scores one too, here with the same states and weight."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    labels = torch.full_like(p.targets, -100).flatten()
    labels[p.rows] = p.targets.flatten()[p.rows]
    labels = labels.view_as(p.targets)
    order = torch.arange(len(p.ref), device=labels.device).view(-1, 2).t().flatten()
    x = p.hidden[order]
    loss, _ = LigerFusedLinearDPOLoss(beta=BETA)(
        p.weight, x, labels[order], ref_input=x.detach(), ref_weight=p.weight.detach())
    return loss * (len(p.ref) // 2)


def ours_two_pass(p: Problem) -> Tensor:
    x, targets = p.hidden.flatten(0, 1)[p.rows], p.targets.flatten()[p.rows]
    logps = linear_logp(x, p.weight, targets, path="gemm")
    return pair_loss(segment_sum(logps, p.cu_seqlens), p.ref)


def ours_dpo(p: Problem) -> Tensor:
    x, targets = p.hidden.flatten(0, 1)[p.rows], p.targets.flatten()[p.rows]
    return linear_dpo(x, p.weight, targets, p.cu_seqlens, p.ref, beta=BETA)[0]


def contenders(stage: str, device: str) -> dict[str, Callable[[Problem], Tensor]]:
    """What can run here, ours first; prints what cannot."""
    gpu, have = device == "cuda", importlib.util.find_spec
    if stage == "dpo":
        found = {"srit linear_dpo": ours_dpo, "srit linear_logp": ours_two_pass,
                 "trl, all rows": trl_all_rows, "eager, completions": eager_completions}
        peers = {"liger dpo": (liger_dpo, gpu and have("liger_kernel"))}
    elif stage == "score":
        found = {"srit": ours_gemm, "eager float32": eager, "selective": selective,
                 "torch.compile": compiled}
        peers = {"srit fused": (ours_fused, gpu)}
    else:
        found = {"srit linear_nll": ours_nll, "srit stash": ours_stash,
                 "srit recompute": ours_recompute, "eager float32": eager, "selective": selective,
                 "torch.compile": compiled}
        if stage == "frozen":
            found = {"srit linear_nll": ours_nll, "srit linear_logp": ours_stash,
                     "eager float32": eager, "torch.compile": compiled}
        peers = {
            "torch chunked": (torch_chunked, hasattr(F, "linear_cross_entropy")),
            "liger": (liger, gpu and have("liger_kernel")),
            "cut-cross-entropy": (cut_cross_entropy, gpu and have("cut_cross_entropy")),
        }
    for name, (function, available) in peers.items():
        if available:
            found[name] = function
        else:
            print(f"{stage}: {name} is left out: not installed, or not for this device")
    return found


def call(function: Callable[[Problem], Tensor], p: Problem) -> list[Tensor]:
    """The value, and the gradients of what is trained."""
    if p.stage == "score":
        with torch.no_grad():
            return [function(p)]
    p.hidden.grad = p.weight.grad = None
    loss = function(p)
    loss.backward()
    return [loss.detach(), p.hidden.grad, *([p.weight.grad] if p.weight.requires_grad else [])]


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def gate(stage: str, dtype: torch.dtype, device: str,
         found: dict[str, Callable[[Problem], Tensor]]) -> dict[str, Callable[[Problem], Tensor]]:
    """The contenders that agree with float64 at an odd shape; exits when one of ours does not."""
    p = make_problem(stage, 515, 64, 5003, dtype, device)
    wide = Problem(stage, p.hidden.detach().double(), p.weight.detach().double(), p.targets, p.rows,
                   p.cu_seqlens, p.ref)
    wide.hidden.requires_grad_(p.hidden.requires_grad)
    wide.weight.requires_grad_(p.weight.requires_grad)
    want = call(eager_completions if stage == "dpo" else eager, wide)
    passed = {}
    for name, function in found.items():
        if name == "liger dpo":  # its loss is another one: it knows no cached reference
            passed[name] = function
            continue
        try:
            worst = max(map(relative_error, call(function, p), want))
        except Exception as error:
            if name.startswith("srit"):
                raise
            print(f"{stage} {dtype}: {name} is left out: {type(error).__name__}: {error}"[:200])
            continue
        if worst <= BOUNDS[dtype]:
            passed[name] = function
        elif name.startswith("srit"):
            raise SystemExit(f"{stage} {dtype}: {name} is off by {worst:.1e} from float64")
        else:
            print(f"{stage} {dtype}: {name} is left out: off by {worst:.1e} from float64")
    return passed


def timed(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(function: Callable[[], object], device: str) -> int:
    """Most memory that one call takes beyond what was there.

    On the CPU the kernel's own high-water mark of the process, which can be reset; freed memory that
    the C library still holds is given back first, or the call would find it for nothing.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20)
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) >> 10


def status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def gemm_milliseconds(p: Problem, device: str, rounds: int) -> float:
    """The stage's bare GEMMs over all scored rows, from a chunk of them."""
    w = p.weight.detach()
    rows = min(p.scored, chunk_limit(w, len(w), None))
    x = p.hidden.detach().flatten(0, -2)[:rows].contiguous()
    z = torch.empty(rows, len(w), dtype=w.dtype, device=device)
    g, dx, dw = torch.randn_like(z), torch.empty_like(x), torch.empty_like(w)
    work = [lambda: torch.mm(x, w.t(), out=z), lambda: torch.mm(g, w, out=dx),
            lambda: torch.mm(g.t(), x, out=dw)][: GEMMS[p.stage]]
    total = 0.0
    for function in work:
        function()
        total += statistics.median(timed(function, device) for _ in range(rounds))
    return total * p.scored / rows


def copy_rate(device: str) -> float:
    """GB/s of a large copy, bytes read and written."""
    source = torch.randn((64 if device == "cpu" else 1024) << 20, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.nbytes / best / 1e6


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


def measure(p: Problem, found: dict, model: str, n: int, device: str, rounds: int) -> list[dict]:
    """Times and peaks of every contender on one problem."""
    torch._dynamo.reset()  # compiled anew, for this shape alone
    peaks, times = {}, {name: [] for name in found}
    for name, function in list(found.items()):
        try:
            call(function, p)  # compiles, and warms up
            p.hidden.grad = p.weight.grad = None
            peaks[name] = peak_mib(lambda f=function: call(f, p), device)
        except torch.OutOfMemoryError:
            peaks[name] = None
        torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, function in found.items():
            if peaks[name] is not None:
                times[name].append(timed(lambda f=function: call(f, p), device))
    p.hidden.grad = p.weight.grad = None
    gemm = gemm_milliseconds(p, device, rounds)
    base = statistics.median(times[OURS[p.stage]])
    flops = 2 * GEMMS[p.stage] * p.scored * p.weight.numel()
    rows = []
    for name, values in times.items():
        row = {"stage": p.stage, "model": model, "n": n, "scored": p.scored,
               "d": p.weight.shape[1], "v": len(p.weight),
               "dtype": str(p.weight.dtype).removeprefix("torch."), "contender": name}
        if not values:
            rows.append(row | {"peak_mib": "out of memory"})
            continue
        middle = statistics.median(values)
        rows.append(row | {
            "p20_ms": round(quantile(values, 0.2), 3), "p50_ms": round(middle, 3),
            "p80_ms": round(quantile(values, 0.8), 3), "tflops": round(flops / middle / 1e9, 2),
            "percent_of_gemm": round(100 * gemm / middle, 1),
            "ratio_to_ours": round(middle / base, 2), "peak_mib": peaks[name]})
    return rows


def show(rows: list[dict]) -> None:
    first = rows[0]
    print("\n{stage}  {model}  N={scored}  {dtype}".format(**first))
    for row in rows:
        if "p50_ms" not in row:
            print(f"  {row['contender']:22} out of memory")
            continue
        print("  {contender:22} {p50_ms:10.2f} ms {ratio_to_ours:6.2f}x  {percent_of_gemm:6.1f} % of "
              "GEMM rate {peak_mib:7d} MiB".format(**row), flush=True)


def stamp_of_this_run() -> dict:
    """Taken before the first result is written, which would make the working tree dirty."""
    stamp = {"device": device_name(), "torch": torch.__version__, "commit": describe()["commit"]}
    if importlib.util.find_spec("triton"):
        import triton

        stamp["triton"] = triton.__version__
    return stamp


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{describe()['machine']}"


def fused_table(rows: list[dict]) -> None:
    """The line for FUSED_UP_TO: the largest D at which path B wins, N = 16384."""
    times = {(r["d"], r["contender"]): r["p50_ms"] for r in rows
             if r["stage"] == "score" and r["n"] == 16384 and "p50_ms" in r}
    wins = [d for d, name in times if name == "srit fused" and times[d, name] < times[d, "srit"]]
    print(f"\nFUSED_UP_TO: {{{device_name()!r}: {max(wins, default=0)}}}")


def plot(path: Path) -> None:
    """One figure a stage and dtype: time relative to ours, and peak memory."""
    plt = pyplot()
    with open(path, newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["p50_ms"]]
    colors = ["#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999", "#F0E442"]
    for stage, dtype in dict.fromkeys((row["stage"], row["dtype"]) for row in rows):
        part = [row for row in rows if (row["stage"], row["dtype"]) == (stage, dtype)]
        shapes = list(dict.fromkeys((row["model"], row["n"]) for row in part))
        names = list(dict.fromkeys(row["contender"] for row in part))
        height = max(2.4, 0.3 * len(shapes) * (len(names) + 1) + 1.2)
        figure, axes = plt.subplots(1, 2, figsize=(10, height), sharey=True)
        for axis, column in zip(axes, ("ratio_to_ours", "peak_mib"), strict=True):
            for row in part:
                y = -(shapes.index((row["model"], row["n"])) * (len(names) + 1)
                      + names.index(row["contender"]))
                value = float(row[column])
                axis.barh(y, value, color=colors[names.index(row["contender"]) % len(colors)])
                label = f"{value:.2f}" if column == "ratio_to_ours" else f"{value:.0f}"
                axis.annotate(label, (value, y), (3, 0), textcoords="offset points", va="center",
                              fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.12)
        ticks = {-(i * (len(names) + 1) + j): name
                 for i, _ in enumerate(shapes) for j, name in enumerate(names)}
        axes[0].set_yticks(list(ticks), list(ticks.values()))
        for i, (model, n) in enumerate(shapes):
            axes[0].annotate(f"{model}, N = {n}", (0, -i * (len(names) + 1) + 0.6), fontsize=9,
                             fontweight="bold")
        axes[0].axvline(1, color="#666666", linewidth=0.8)
        axes[0].set_xlabel(f"time / {OURS[stage]}")
        axes[1].set_xlabel("peak memory, MiB")
        figure.suptitle(f"{stage}, {dtype}, {part[0]['device']}, torch {part[0]['torch']}", fontsize=10)
        figure.tight_layout()
        target = path.with_name(f"{path.stem}_{stage}_{dtype}.svg")
        figure.savefig(target)
        plt.close(figure)
        print(target)


def table(path: Path) -> None:
    """The CSV as Markdown."""
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    print("| stage | dtype | contender | ms | of ours | of the bare GEMMs' rate | peak MiB |")
    print("|---|---|---|--:|--:|--:|--:|")
    for row in rows:
        ms, share = float(row["p50_ms"] or "nan"), float(row["percent_of_gemm"] or "nan")
        print(f"| {row['stage']} | {row['dtype']} | {row['contender']} | {ms:.0f} | "
              f"{row['ratio_to_ours']} | {share:.0f} % | {row['peak_mib']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--stages", nargs="+", choices=list(GEMMS), default=list(GEMMS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS),
                        default=list(MODELS) if gpu else ["SmolLM2-135M"])
    parser.add_argument("--rows", nargs="+", type=int, metavar="N",
                        default=[16384, 4096, 65536] if gpu else [2048],
                        help="N, scored rows; dpo has as many prompt rows beside them")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"],
                        default=["bfloat16"] if gpu else ["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20 if gpu else 5)
    parser.add_argument("--time_limit", type=float, default=float("inf"),
                        help="seconds; shapes that would start later are skipped")
    parser.add_argument("--output")
    parser.add_argument("--plot", metavar="CSV", help="only show a CSV: table and figures")
    args = parser.parse_args()
    if args.plot:
        table(Path(args.plot))
        plot(Path(args.plot))
        return
    device = "cuda" if gpu else "cpu"
    slug = device_name().replace(" ", "-") if gpu else "cpu"
    output = Path(args.output or Path(__file__).parent / f"results/bench_kernels_{slug}.csv")
    started, rows, stamp = time.monotonic(), [], stamp_of_this_run()
    print(f"{device_name()}: copies {copy_rate(device):.0f} GB/s, {os.cpu_count()} CPUs")
    found = {(stage, name): gate(stage, getattr(torch, name), device, contenders(stage, device))
             for name in args.dtypes for stage in args.stages}
    for n in args.rows:
        for model in args.models:
            for stage, name in found:
                if time.monotonic() - started > args.time_limit:
                    print(f"time limit: {stage} {model} N={n} {name} skipped")
                    continue
                d, vocab = MODELS[model]
                problem = make_problem(stage, n, d, vocab, getattr(torch, name), device)
                new = measure(problem, found[stage, name], model, n, device, args.rounds)
                show(new)
                rows += new
                write_csv([row | stamp for row in rows], output)
    if gpu and "score" in args.stages:
        fused_table(rows)
    print(output)


if __name__ == "__main__":
    main()
