"""`srit demos`: get demonstrations from a teacher behind an OpenAI-compatible server.

Every question is asked once, with the chain-of-thought prompt of the other stages. Answers are appended
to answers.jsonl as they arrive, so a resumed run asks only what is missing; demos.jsonl is written at
the end. Wrong answers are kept: `srit sft` filters them by ground truth.
"""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srit.data.questions import read_questions
from srit.grading.answers import grade
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, cut_torn_line, has_rows, read_jsonl, write_jsonl
from srit.runtime.run_dir import claim_output_dir, write_run
from srit.text.prompts import question_messages

Answer = tuple[str, str]  # text, finish reason


@dataclass
class DemosConfig:
    """Phase 0: get chain-of-thought demonstrations from a teacher model behind a server."""

    train_file: list[str]
    """Question files."""
    output_dir: str
    """Where demos.jsonl, answers.jsonl (the raw answers as they arrive) and run.json go."""
    model: str
    """Name of the teacher model on the server."""
    base_url: str | None = None
    """Address of the server, such as http://localhost:8000/v1; default: OPENAI_BASE_URL."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. (A key on the command line could leak.)"""
    temperature: float = 0.0
    """0 is greedy."""
    max_new_tokens: int = 512
    """Maximum length of an answer. Answers that reach it are dropped and counted."""
    concurrency: int = 8
    """Number of simultaneous requests."""
    max_retries: int = 5
    """Retries after a connection error, a timeout or an overloaded server, with back-off."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    limit: int | None = None
    """Use only the first questions of every file."""
    overwrite_output_dir: bool = False
    """Delete output_dir and start over; otherwise an unfinished run is resumed."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("temperature", "max_retries"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be 0 or more")


def connect(cfg: DemosConfig) -> Any:
    """A client with its own retries. Raises InputError if the package or the key is missing."""
    try:
        import openai
    except ImportError:
        raise InputError("srit demos needs the openai package: pip install 'srit[teacher]'"
                         ) from None
    base_url = cfg.base_url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get(cfg.api_key_variable)
    if not key and not base_url:
        raise InputError(f"the environment variable {cfg.api_key_variable} holds no key; set it, or "
                         "give the --base_url of a server that needs none")
    return openai.OpenAI(api_key=key or "none", base_url=base_url, max_retries=cfg.max_retries,
                         timeout=cfg.timeout)


def ask(client: Any, cfg: DemosConfig, row: dict) -> Answer:
    """Ask the teacher one question."""
    reply = client.chat.completions.create(
        model=cfg.model, messages=question_messages(row, "cot"), temperature=cfg.temperature,
        max_tokens=cfg.max_new_tokens)
    if not reply.choices:
        return "", "empty"
    return reply.choices[0].message.content or "", reply.choices[0].finish_reason or "stop"


# HTTP status of an error that all questions share (wrong key, model, address), and of one that only
# this question has (too long, filtered). Retrying helps neither.
REFUSED, REJECTED = (401, 403, 404), (400, 413, 422)


def collect(questions: list[dict], path: Path, answer: Callable[[dict], Answer],
            concurrency: int) -> dict[str, str]:
    """Append an answer to every question to `path`. Returns {id: reason} of those that failed.

    Raises InputError at the first error that all questions share.
    """
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(concurrency)
    futures = {pool.submit(answer, row): row["id"] for row in questions}
    try:
        with open(path, "a", encoding="utf-8") as handle:
            for number, future in enumerate(as_completed(futures), 1):
                text, reason, problem = "", "rejected", None
                try:
                    text, reason = future.result()
                except Exception as error:
                    status, problem = getattr(error, "status_code", None), _line(error)
                    if status in REFUSED:
                        raise InputError(f"the server refuses: {problem}") from None
                    if status in REJECTED:
                        problem = None
                if problem:
                    failed[futures[future]] = problem
                else:
                    row = {"id": futures[future], "completion": text, "finish_reason": reason}
                    handle.write(json.dumps(row, ensure_ascii=False) + "\n")
                    handle.flush()
                if number % 100 == 0:
                    print(f"{number:,} of {len(questions):,} asked, {len(failed):,} failed",
                          flush=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return failed


def main(cfg: DemosConfig, client: Any = None) -> None:
    started = time.time()
    questions: dict[str, dict] = {}
    for file in cfg.train_file:
        for row in read_questions(file)[: cfg.limit]:
            if row["id"] in questions:
                raise InputError(f"{file}: duplicate id {row['id']!r}, also in another file")
            questions[row["id"]] = row
    client = client or connect(cfg)
    claim_output_dir(cfg.output_dir, "demos", cfg)

    path = Path(cfg.output_dir) / "answers.jsonl"
    cut_torn_line(path)
    answers = read_answers(path)
    missing = [row for key, row in questions.items() if key not in answers]
    print(f"{len(questions):,} questions, {len(questions) - len(missing):,} answered before")
    failed = collect(missing, path, lambda row: ask(client, cfg, row), cfg.concurrency)
    if failed:
        raise InputError(f"{len(failed):,} of {len(questions):,} questions have no answer, the "
                         f"first because of: {next(iter(failed.values()))}; "
                         "the same command asks them again")

    demos, counts = make_demos(list(questions.values()), read_answers(path), cfg.model)
    if not demos:
        raise InputError(f"no usable answer: {counts}")
    write_jsonl(Path(cfg.output_dir) / "demos.jsonl", demos)
    right = sum(grade(row["completion"], row).correct for row in demos)
    print(counts, f"right answers: {right:,} of {len(demos):,}", sep="\n")
    write_run(cfg.output_dir, "demos", cfg, [counts], started, right=right)


def read_answers(path: Path) -> dict[str, dict]:
    """{question id: row} of answers.jsonl."""
    return {row["id"]: row for row in read_jsonl(path)} if has_rows(path) else {}


def make_demos(questions: list[dict], answers: dict[str, dict],
               teacher: str) -> tuple[list[dict], Counts]:
    """Demonstrations in the order of the questions. Cut, empty and rejected answers are dropped."""
    demos, counts = [], Counts("answers")
    for row in questions:
        answer = answers[row["id"]]
        if answer["finish_reason"] == "rejected":
            counts.drop("rejected by the server")
        elif not answer["completion"].strip():
            counts.drop("empty")
        elif answer["finish_reason"] == "length":
            counts.drop("cut at max_new_tokens")
        else:
            counts.use()
            demos.append({**row, "teacher": teacher, "completion": answer["completion"].strip()})
    return demos, counts


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
