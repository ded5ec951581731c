"""Questions in, graded completions out: what train/sample.py and train/eval.py share.

Rows are appended to a file as they finish, and sorted when all are there. A killed run resumes where it
stopped and ends with the same bytes as an uninterrupted one.
"""

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from srit.config import GenerateConfig, QuestionConfig
from srit.data.batches import shared_prefix
from srit.data.questions import dataset_name, read_questions
from srit.generation.engine import generate
from srit.generation.params import Request, Result, SamplingParams, request_seed
from srit.generation.vllm import VLLM
from srit.grading.judge import load_judge
from srit.models import Decoder, load_model
from srit.models.load import resolve
from srit.runtime import distributed, shutdown
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, cut_torn_line, has_rows, read_jsonl, write_jsonl
from srit.runtime.outcome import Stopped
from srit.runtime.progress_bar import progress_bar
from srit.text.prompts import DEFAULT, question_messages, render
from srit.text.tokenizer import Tokenizer, load_tokenizer

Key = tuple[str, str, str, int]  # dataset, id, prompt style, sample


@dataclass(frozen=True)
class Prompt:
    """A question in one prompt style, rendered and tokenised."""

    row: dict
    file: str
    dataset: str
    style: str
    ids: tuple[int, ...]
    text: str

    def key(self, sample: int) -> Key:
        return self.dataset, self.row["id"], self.style, sample


def read_prompts(files: Sequence[str], styles: Sequence[str], tokenizer: Tokenizer,
                 limit: int | None, one_id_space: bool = False,
                 cfg: QuestionConfig = DEFAULT) -> list[Prompt]:
    """The questions of all files, each in all styles. Raises InputError for a duplicate id.

    one_id_space: also when the two belong to different data sets. Pairs are found by id alone.
    cfg: as of `question_messages` and `load_judge`.
    """
    prompts, seen, judge = [], {}, load_judge(cfg)
    for file in files:
        dataset = dataset_name(file)
        for row in read_questions(file, judge)[:limit]:
            key = None if one_id_space else dataset, row["id"]
            if key in seen:
                raise InputError(f"{file}: duplicate id {row['id']!r} in data set '{dataset}', first "
                                 f"seen in {seen[key]}; make the ids different")
            seen[key] = file
            for style in styles:
                rendered = render(tokenizer, question_messages(row, style, cfg))
                prompts.append(Prompt(row, file, dataset, style, tuple(rendered.ids), rendered.text))
    return prompts


def load_for_generation(cfg: GenerateConfig, device: torch.device,
                        today: str) -> tuple[Decoder | VLLM, Tokenizer]:
    """The model in cfg.dtype with its weights packed for inference, and its tokenizer."""
    tokenizer = load_tokenizer(cfg.model_name_or_path, today, cfg.chat_template_kwargs)
    if cfg.engine == "vllm":
        if distributed.world_size() > 1:
            raise InputError("--engine vllm: run one process, without torchrun")
        model = VLLM(resolve(cfg.model_name_or_path), cfg.dtype, cfg.per_device_batch_size,
                     _cache_bytes(cfg), bool(cfg.stop_strings))
    else:
        model, _ = load_model(cfg.model_name_or_path, dtype=getattr(torch, cfg.dtype), device=device)
        model.pack_weights(cfg.quantization)
    tokenizer.check_model(model.config.vocab_size)
    return model, tokenizer


def check_fit(prompts: Sequence[Prompt], model: Decoder | VLLM, max_new_tokens: int) -> None:
    """Raise InputError for a prompt that is too long: without it, an accuracy would mean less."""
    for prompt in prompts:
        if not fits_context(prompt, model, max_new_tokens):
            raise InputError(
                f"{prompt.file}: {prompt.row['id']!r} has {len(prompt.ids)} prompt tokens, with "
                f"--max_new_tokens {max_new_tokens} more than the "
                f"{model.config.max_position_embeddings} positions of the model; lower it")


def drop_too_long(prompts: Sequence[Prompt], model: Decoder | VLLM,
                  max_new_tokens: int) -> tuple[list[Prompt], Counts]:
    """The prompts that fit the model's context, counted. Raises InputError when none does."""
    counts, kept = Counts("prompts"), [p for p in prompts if fits_context(p, model, max_new_tokens)]
    counts.use(len(kept))
    if len(kept) < len(prompts):
        counts.drop(f"too long with max_new_tokens {max_new_tokens}", len(prompts) - len(kept))
    if not kept:
        raise InputError(f"nothing to answer: {counts}")
    return kept, counts


def fits_context(prompt: Prompt, model: Decoder | VLLM, max_new_tokens: int) -> bool:
    """Whether prompt and completion stay within the positions of the model."""
    return len(prompt.ids) + max_new_tokens <= model.config.max_position_embeddings


def generate_rollouts(model: Decoder | VLLM, tokenizer: Tokenizer, prompts: Sequence[Prompt],
                      path: Path, cfg: GenerateConfig) -> list[dict]:
    """Write `cfg.num_samples` graded rows per prompt to `path`, and return them in order.

    Ranks share the questions; each appends to its own file, and rank 0 merges them. Raises Stopped
    when the run was asked to end, and InputError when `path` holds rows of other questions.
    """
    own = path if distributed.rank() == 0 else _rank_file(path, distributed.rank())
    cut_torn_line(own)
    distributed.barrier()
    done = {_key(row): (row["correct"], row["finished"]) for row in _read_all_ranks(path)}
    distributed.barrier()  # nobody appends before everybody has read

    wanted = {p.key(s): (p, s) for p in prompts for s in range(cfg.num_samples)}
    if unknown := done.keys() - wanted.keys():
        raise InputError(f"{path}: has rows that this run does not ask for, such as "
                         f"{next(iter(unknown))}; have the questions changed?")
    progress = _Progress(len(wanted), done.values())
    with open(own, "a", encoding="utf-8") as handle:
        def write(request: Request, result: Result) -> None:
            row = make_row(*wanted[request.key], result, tokenizer, cfg)
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            handle.flush()
            progress.add(row)

        run = model.generate if isinstance(model, VLLM) else partial(generate, model)
        run(_requests(prompts, done, cfg), SamplingParams.from_config(cfg),
            stop_ids=tokenizer.stop_ids, decode=tokenizer.decode, encode=tokenizer.encode,
            slots=cfg.per_device_batch_size, cache_bytes=_cache_bytes(cfg),
            prefix=shared_prefix([p.ids for p in prompts]), readers_per_prompt=cfg.num_samples,
            on_finish=write, should_stop=shutdown.requested)
    progress.bar.close()
    distributed.barrier()
    if distributed.any_rank(shutdown.requested()):
        raise Stopped(f"stopped: {path} has the rows so far; the same command goes on from there")
    rows = {_key(row): row for row in _read_all_ranks(path)}
    rows = [rows[key] for key in wanted]
    distributed.barrier()
    if distributed.rank() == 0:
        write_jsonl(path, rows)
        for part in _rank_files(path):
            part.unlink()
    distributed.barrier()
    return rows


def _requests(prompts: Sequence[Prompt], done: Collection[Key], cfg: GenerateConfig) -> list[Request]:
    """This rank's requests, all samples of a question on one rank, without those already done."""
    questions: dict[tuple[str, str], list[Prompt]] = {}
    for prompt in prompts:
        questions.setdefault((prompt.dataset, prompt.row["id"]), []).append(prompt)
    own = list(questions.values())[distributed.rank() :: distributed.world_size()]
    return [Request(p.key(s), p.ids, request_seed(cfg.seed, p.row["id"], s, p.style),
                    shared_prefix([style.ids for style in styles]))
            for styles in own for p in styles for s in range(cfg.num_samples) if p.key(s) not in done]


def make_row(prompt: Prompt, sample: int, result: Result, tokenizer: Tokenizer,
             cfg: GenerateConfig) -> dict:
    """A row of samples.jsonl: the question, the completion up to a stop string, and its grade."""
    text = tokenizer.decode(result.ids)
    text = text[: min((at for s in cfg.stop_strings if (at := text.find(s)) >= 0), default=None)]
    judged = load_judge(cfg)(text, prompt.row)
    keys = ("id", "task", "question", "choices", "answer")
    row = {key: prompt.row[key] for key in keys if key in prompt.row}
    more = {} if result.logps is None else {"logps": result.logps}
    if judged.score is not None:
        more["score"] = judged.score
    if forced := [[start, min(end, len(text))] for start, end in result.forced if start < len(text)]:
        more["forced"] = forced
    return row | {
        "dataset": prompt.dataset, "sample": sample, "prompt_style": prompt.style,
        "prompt": prompt.text, "text": text, "seed": cfg.seed, "n_tokens": len(result.ids),
        "finished": result.finished, "extracted": judged.extracted, "correct": judged.correct,
        "correct_strict": judged.strict_correct,
    } | more


def _cache_bytes(cfg: GenerateConfig) -> int | None:
    return int(cfg.max_cache_memory * 2**30) or None


def _key(row: dict) -> Key:
    return row["dataset"], row["id"], row["prompt_style"], row["sample"]


def _rank_file(path: Path, rank: int | str) -> Path:
    return path.with_suffix(f".rank{rank}{path.suffix}")


def _rank_files(path: Path) -> list[Path]:
    """The files of ranks above 0."""
    return sorted(path.parent.glob(_rank_file(path, "*").name))


def _read_all_ranks(path: Path) -> list[dict]:
    """The rows that all ranks have written so far."""
    files = filter(has_rows, (path, *_rank_files(path)))
    return [row for file in files for row in read_jsonl(file)]


class _Progress:
    """A bar with rank 0's speed, running accuracy and share of finished completions."""

    def __init__(self, total: int, done: Collection[tuple[bool, bool]]) -> None:
        self.n, self.tokens = len(done), 0
        self.correct, self.finished = (sum(row[i] for row in done) for i in (0, 1))
        self.started = time.perf_counter()
        world = distributed.world_size()
        self.bar = progress_bar(total=total // world, initial=self.n // world, unit="sample")

    def add(self, row: dict) -> None:
        self.n, self.tokens = self.n + 1, self.tokens + row["n_tokens"]
        self.correct, self.finished = self.correct + row["correct"], self.finished + row["finished"]
        speed = self.tokens / (time.perf_counter() - self.started)
        self.bar.set_postfix_str(f"{speed:.0f} tokens/s, correct {self.correct / self.n:.1%}, "
                                 f"finished {self.finished / self.n:.1%}", refresh=False)
        self.bar.update()
