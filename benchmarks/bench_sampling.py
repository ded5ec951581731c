"""Time to answer N questions with K samples each: our engine against generate() of transformers.

    python benchmarks/bench_sampling.py --model_name_or_path M [--questions 200] [--samples 4]
                                        [--calculator] [--quantization int8]

First a gate: greedy answers must be the same tokens in both (float32). Then both do the same work in
turns: transformers with left padding, prompts sorted by length, at every --hf_batch_size; the ratio is
taken to its fastest. Tokens are counted up to the end of each answer, without padding. Also reported:
the share of the measured read bandwidth that reading the weights takes (once per forward pass).
--calculator: our engine once more in each turn, with its calculator. --quantization int8: once more
with int8 products; its greedy answers, and those of the dtype, are compared with those of float32.
The questions are the demo's out-of-domain word problems in the model's own chat template.
Writes benchmarks/results/bench_sampling_*.csv. Needs the [bench] extra.
"""

import argparse
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tables import write_csv
from transformers import AutoModelForCausalLM

from srit.commands.demo_data import generate as make_questions
from srit.generation.engine import generate
from srit.generation.params import Request, SamplingParams, request_seed
from srit.models import Decoder, load_model
from srit.runtime.run_dir import describe
from srit.text.prompts import question_messages, render
from srit.text.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).parent


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second read by a sum over 1 GiB, the best of five."""
    data, best = torch.ones(2**28, device=device), 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum().item()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def ours(model: Decoder, prompts: list[tuple[int, ...]], args: argparse.Namespace, stop_ids: set[int],
         samples: int, temperature: float, tokenizer: Tokenizer | None = None) -> list[list[int]]:
    """Token ids of every answer, without the stop token. With a tokenizer, it uses the calculator."""
    requests = [Request((i, s), ids, request_seed(0, i, s))
                for i, ids in enumerate(prompts) for s in range(samples)]
    params = SamplingParams(args.max_new_tokens, temperature, calculator=tokenizer is not None)
    ways = {"encode": tokenizer.encode, "decode": tokenizer.decode} if tokenizer else {}
    results = generate(model, requests, params, stop_ids=stop_ids, slots=args.slots, **ways)
    return [results[request.key].ids for request in requests]


@torch.inference_mode()
def theirs(model: torch.nn.Module, prompts: list[tuple[int, ...]], args: argparse.Namespace,
           stop_ids: set[int], samples: int, temperature: float, batch_size: int) -> list[list[int]]:
    """The same by transformers; `batch_size` counts samples."""
    answers: dict[int, list[list[int]]] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = chosen if temperature else {"do_sample": False}
    per_batch = max(1, batch_size // samples)
    for at in range(0, len(order), per_batch):
        part = order[at : at + per_batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + list(prompts[i]) for i in part],
                           device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part],
                            device=model.device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=args.max_new_tokens,
                             num_return_sequences=samples, eos_token_id=sorted(stop_ids),
                             pad_token_id=0, **settings)[:, width:].tolist()
        for j, i in enumerate(part):
            rows = out[j * samples : (j + 1) * samples]
            ends = [next((k for k, t in enumerate(row) if t in stop_ids), len(row)) for row in rows]
            answers[i] = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return [row for i in range(len(prompts)) for row in answers[i]]


def agreement(answers: list[list[int]], exact: list[list[int]]) -> float:
    """The mean share of an answer before its first difference."""
    shares = []
    for a, b in zip(answers, exact, strict=True):
        length = max(len(a), len(b), 1)
        shares.append(next((i for i in range(length) if a[i : i + 1] != b[i : i + 1]), length) / length)
    return statistics.mean(shares)


def read_prompts(tokenizer: Tokenizer, n: int) -> list[tuple[int, ...]]:
    rows = make_questions(n, 0, "out")
    return [tuple(render(tokenizer, question_messages(row, "cot")).ids) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="a Hugging Face directory")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--slots", type=int, default=128, help="sequences that decode together")
    parser.add_argument("--hf_batch_size", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--gate", type=int, default=50, help="questions compared greedily")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--calculator", action="store_true", help="measure it as well")
    parser.add_argument("--quantization", choices=["int8"], help="measure it as well")
    parser.add_argument("--output")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    tokenizer = load_tokenizer(args.model_name_or_path)
    stop_ids = set(tokenizer.stop_ids)
    everything = read_prompts(tokenizer, max(args.questions, args.gate))
    prompts, some = everything[: args.questions], everything[: args.gate]

    def load(dtype: torch.dtype) -> tuple[Decoder, torch.nn.Module]:
        own = load_model(args.model_name_or_path, dtype=dtype, device=device)[0]
        own.pack_weights()  # as sample and eval do
        other = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=dtype)
        return own, other.to(device)

    a, b = load(torch.float32)
    exact = ours(a, some, args, stop_ids, 1, 0.0)
    pairs = list(zip(exact, theirs(b, some, args, stop_ids, 1, 0.0, 16), strict=True))
    wrong = [i for i, (x, y) in enumerate(pairs) if x != y]
    if wrong:
        sys.exit(f"greedy answers differ for {len(wrong)} of {len(some)} questions, first {wrong[0]}:"
                 f"\n{tokenizer.decode(pairs[wrong[0]][0])!r}\n{tokenizer.decode(pairs[wrong[0]][1])!r}")
    print(f"greedy answers of {len(some)} questions are the same tokens", flush=True)
    if dtype != torch.float32:
        a, b = load(dtype)

    contenders = {f"srit, {args.slots} slots": (a, ours, ())}
    contenders |= {f"transformers, batch {size}": (b, theirs, (size,)) for size in args.hf_batch_size}
    if args.calculator:
        contenders[f"srit, {args.slots} slots, calculator"] = a, ours, (tokenizer,)
    weights = {model: sum(p.nbytes for p in b.parameters()) for model in (a, b)}
    if args.quantization:
        q = load_model(args.model_name_or_path, dtype=dtype, device=device)[0]
        weights[q] = weights[b] - sum(p.nbytes - p.numel() for p in q.model.layers.parameters())
        q.pack_weights(args.quantization)
        contenders[f"srit, {args.slots} slots, {args.quantization}"] = q, ours, ()
    greedy = {model: agreement(ours(model, some, args, stop_ids, 1, 0.0), exact)
              for model in weights if model is not b}
    bandwidth, forwards = read_bandwidth(device), [0]
    for model in weights:
        model.model.norm.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    runs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in contenders}
    for turn in range(args.rounds):
        for name, (model, run, rest) in contenders.items():
            torch.manual_seed(turn)
            forwards[0], started = 0, time.perf_counter()
            answers = run(model, prompts, args, stop_ids, args.samples, args.temperature, *rest)
            seconds = time.perf_counter() - started
            runs[name].append((seconds, sum(map(len, answers)), forwards[0]))
            print(f"round {turn + 1}, {name}: {seconds:.1f} s, {runs[name][-1][1]} tokens, "
                  f"{forwards[0]} forward passes", flush=True)

    machine, rows = describe(), []
    for name, measured in runs.items():
        seconds = statistics.median(s for s, _, _ in measured)
        model = contenders[name][0]
        read = statistics.median(f * weights[model] / s / bandwidth for s, _, f in measured)
        rows.append({
            "contender": name, "model": Path(args.model_name_or_path).name, "dtype": args.dtype,
            "questions": args.questions, "samples": args.samples,
            "max_new_tokens": args.max_new_tokens, "seconds": round(seconds, 1),
            "tokens_per_second": round(statistics.median(t / s for s, t, _ in measured), 1),
            "weight_reads_of_bandwidth": round(read, 3),
            "greedy_as_float32": round(greedy[model], 3) if model in greedy else "",
            "commit": machine["commit"],
            "torch": torch.__version__, "transformers": version("transformers"),
            "machine": machine["machine"]})
    best = min(row["seconds"] for row in rows if row["contender"].startswith("transformers"))
    for row in rows:
        row["speed_to_transformers"] = round(best / row["seconds"], 2)
        print("{contender:28} {seconds:8.1f} s  {tokens_per_second:8.1f} tokens/s  "
              "{speed_to_transformers:5.2f}x  {greedy_as_float32}".format(**row))
    where = torch.cuda.get_device_name().replace(" ", "-") if device.type == "cuda" else "cpu"
    output = Path(args.output or HERE / f"results/bench_sampling_{args.dtype}_{where}.csv")
    write_csv(rows, output)
    print(output)


if __name__ == "__main__":
    main()
