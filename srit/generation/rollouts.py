"""Questions in, graded generations out: what `sample` and `eval` have in common.

Rows are appended to a file as they end, and the file is put in order when all are there. A run that
was killed goes on where it stopped, and ends with the same bytes as one that was not.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from srit.config import GenerateConfig
from srit.data.questions import dataset_name, read_questions
from srit.generation.engine import Request, Result, generate, request_seed, shared_prefix
from srit.generation.vllm import VLLM
from srit.grading.answers import grade
from srit.models import Decoder, load_model
from srit.models.load import resolve
from srit.runtime import distributed, shutdown
from srit.runtime.files import InputError
from srit.runtime.jsonl import cut_torn_line, has_rows, read_lines, write_jsonl
from srit.text.prompts import question_messages, render
from srit.text.tokenizer import Tokenizer, load_tokenizer

Key = tuple[str, str, str, int]  # dataset, id, prompt style, sample


@dataclass(frozen=True)
class Prompt:
    """A question in one prompt style, ready to be answered."""

    row: dict
    file: str
    dataset: str
    style: str
    ids: tuple[int, ...]
    text: str

    def key(self, sample: int) -> Key:
        return self.dataset, self.row["id"], self.style, sample


def read_prompts(files: Sequence[str], styles: Sequence[str], tokenizer: Tokenizer,
                 limit: int | None) -> list[Prompt]:
    """The questions of all files, each in all styles. Raises InputError for an id seen twice."""
    prompts, seen = [], {}
    for file in files:
        dataset = dataset_name(file)
        for row in read_questions(file)[:limit]:
            if (dataset, row["id"]) in seen:
                raise InputError(f"{file}: id {row['id']!r} of data set '{dataset}' stands already "
                                 f"in {seen[dataset, row['id']]}")
            seen[dataset, row["id"]] = file
            for style in styles:
                rendered = render(tokenizer, question_messages(row, style))
                prompts.append(Prompt(row, file, dataset, style, tuple(rendered.ids),
                                      rendered.text))
    return prompts


def load_for_generation(cfg: GenerateConfig,
                        device: torch.device) -> tuple[Decoder | VLLM, Tokenizer]:
    """Model in cfg.dtype, its weights laid out for inference, and its tokenizer."""
    tokenizer = load_tokenizer(cfg.model_name_or_path)
    if cfg.engine == "vllm":
        if distributed.world_size() > 1:
            raise InputError("--engine vllm: run one process, without torchrun")
        model = VLLM(resolve(cfg.model_name_or_path), cfg.dtype, cfg.per_device_batch_size,
                     _cache_bytes(cfg), bool(cfg.stop_strings))
    else:
        model, _ = load_model(cfg.model_name_or_path, dtype=getattr(torch, cfg.dtype), device=device)
        model.pack_weights()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"{cfg.model_name_or_path}: the tokenizer has {tokenizer.vocab_size} "
                         f"tokens, the model only {model.config.vocab_size}; they do not belong "
                         "together")
    return model, tokenizer


def fits(prompt: Prompt, model: Decoder | VLLM, max_new_tokens: int) -> bool:
    """Whether prompt and completion stay within the positions that the model was built for."""
    return len(prompt.ids) + max_new_tokens <= model.config.max_position_embeddings


def _cache_bytes(cfg: GenerateConfig) -> int | None:
    return int(cfg.max_cache_memory * 2**30) or None


def answer_all(model: Decoder | VLLM, tokenizer: Tokenizer, prompts: Sequence[Prompt], path: Path,
               cfg: GenerateConfig) -> list[dict]:
    """Write `cfg.num_samples` graded rows for every prompt to `path`, and return them in order.

    Ranks share the questions; each appends to a file of its own, and rank 0 merges them.
    """
    rank, world = distributed.rank(), distributed.world_size()
    own = path if rank == 0 else path.with_suffix(f".rank{rank}{path.suffix}")
    cut_torn_line(own)
    distributed.barrier()
    done = {row_key(row): (row["correct"], row["finished"]) for row in read_parts(path)}
    distributed.barrier()  # nobody appends before everybody has read

    by_key = {p.key(s): (p, s) for p in prompts for s in range(cfg.num_samples)}
    if unknown := done.keys() - by_key.keys():
        raise InputError(f"{path}: holds rows that this run does not ask for, such as "
                         f"{next(iter(unknown))}; have the questions changed?")
    styles: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for p in prompts:
        styles.setdefault((p.dataset, p.row["id"]), []).append(p.ids)
    number = {question: at for at, question in enumerate(styles)}
    requests = [Request(key, p.ids, request_seed(cfg.seed, p.row["id"], s, p.style),
                        shared_prefix(styles[p.dataset, p.row["id"]]))
                for p in prompts if number[p.dataset, p.row["id"]] % world == rank
                for s in range(cfg.num_samples) if (key := p.key(s)) not in done]
    log = _Progress(len(by_key), list(done.values()), disable=rank > 0)
    with open(own, "a", encoding="utf-8") as handle:
        def write(request: Request, result: Result) -> None:
            prompt, sample = by_key[request.key]
            row = make_row(prompt, sample, result, tokenizer, cfg)
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            handle.flush()
            log.add(row)

        answer = model.generate if isinstance(model, VLLM) else partial(generate, model)
        answer(requests, stop_ids=tokenizer.stop_ids, on_finish=write,
               max_new_tokens=cfg.max_new_tokens, slots=cfg.per_device_batch_size,
               cache_bytes=_cache_bytes(cfg), temperature=cfg.temperature, top_p=cfg.top_p,
               top_k=cfg.top_k, min_p=cfg.min_p, repetition_penalty=cfg.repetition_penalty,
               stop_strings=cfg.stop_strings, decode=tokenizer.decode, return_logps=cfg.return_logps,
               prefix=shared_prefix([p.ids for p in prompts]), samples=cfg.num_samples,
               should_stop=shutdown.requested)
    log.close()
    distributed.barrier()
    if distributed.any_rank(shutdown.requested()):
        raise shutdown.Stopped(f"stopped: {path} holds what was answered so far; the same command goes "
                           "on from there")
    rows = {row_key(row): row for row in read_parts(path)}
    rows = [rows[key] for key in by_key]
    distributed.barrier()
    if rank == 0:
        write_jsonl(path, rows)
        for part in part_files(path):
            part.unlink()
    distributed.barrier()
    return rows


def make_row(prompt: Prompt, sample: int, result: Result, tokenizer: Tokenizer,
             cfg: GenerateConfig) -> dict:
    """A row of samples.jsonl: the question, the generation up to a stop string, and its grade."""
    text = tokenizer.decode(result.ids)
    text = text[: min((at for s in cfg.stop_strings if (at := text.find(s)) >= 0), default=None)]
    judged = grade(text, prompt.row)
    keys = ("id", "task", "question", "choices", "answer")
    row = {key: prompt.row[key] for key in keys if key in prompt.row}
    logps = {} if result.logps is None else {"logps": result.logps}
    return row | {
        "dataset": prompt.dataset, "sample": sample, "prompt_style": prompt.style,
        "prompt": prompt.text, "text": text, "seed": cfg.seed, "n_tokens": len(result.ids),
        "finished": result.finished, "extracted": judged.extracted, "correct": judged.correct,
        "correct_strict": judged.strict_correct,
    } | logps


def row_key(row: dict) -> Key:
    return row["dataset"], row["id"], row["prompt_style"], row["sample"]


def part_files(path: Path) -> list[Path]:
    """What ranks above 0 have written."""
    return sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))


def read_parts(path: Path) -> list[dict]:
    """The rows that all ranks have written so far."""
    files = filter(has_rows, (path, *part_files(path)))
    return [row for file in files for _, row in read_lines(file)]


class _Progress:
    """A bar with speed, running accuracy and share of finished texts; of rank 0's part."""

    def __init__(self, total: int, done: Sequence[tuple[bool, bool]], disable: bool) -> None:
        self.n, self.tokens = len(done), 0
        self.correct, self.finished = (sum(row[i] for row in done) for i in (0, 1))
        self.started = time.perf_counter()
        world = distributed.world_size()
        self.bar = tqdm(total=total // world, initial=self.n // world, unit="sample",
                        dynamic_ncols=True, disable=disable)

    def add(self, row: dict) -> None:
        self.n, self.tokens = self.n + 1, self.tokens + row["n_tokens"]
        self.correct, self.finished = self.correct + row["correct"], self.finished + row["finished"]
        speed = self.tokens / (time.perf_counter() - self.started)
        self.bar.set_postfix_str(f"{speed:.0f} tokens/s, correct {self.correct / self.n:.1%}, "
                                 f"finished {self.finished / self.n:.1%}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
