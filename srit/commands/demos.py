"""`srit demos`: a teacher behind an OpenAI-compatible server writes the demonstrations.

Every question is asked once, with the project's own chain-of-thought prompt. Answers are appended
to answers.jsonl as they come, so a run that was interrupted asks only what is missing; demos.jsonl
is written when all are there. Wrong answers stay in: `srit sft` drops them by ground truth.
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
from srit.runtime.jsonl import Counts, cut_torn_line, read_jsonl, write_jsonl
from srit.runtime.run_dir import claim_output_dir, write_run
from srit.text.prompts import question_messages

Answer = tuple[str, str]  # text, finish reason


@dataclass
class DemosConfig:
    """Phase 0: chain-of-thought demonstrations from a teacher model behind a server."""

    train_file: list[str]
    """Question files."""
    output_dir: str
    """Where demos.jsonl, answers.jsonl (one line as each answer arrives) and run.json go."""
    model: str
    """The teacher's name on the server."""
    base_url: str | None = None
    """Address of the server, such as http://localhost:8000/v1; else OPENAI_BASE_URL counts."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key: on the command line it would be seen and saved."""
    temperature: float = 0.0
    """0 is greedy."""
    max_new_tokens: int = 512
    """Longest answer; one that reaches it is dropped and counted."""
    concurrency: int = 8
    """Requests under way at the same time."""
    max_retries: int = 5
    """Further tries after a connection error, a time-out or an overloaded server, with back-off."""
    timeout: float = 120.0
    """Seconds to wait for one answer."""
    limit: int | None = None
    """Only the first questions of every file."""
    overwrite_output_dir: bool = False
    """Delete what output_dir holds and start afresh; otherwise an unfinished run goes on."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("temperature", "max_retries"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be 0 or more")


def connect(cfg: DemosConfig) -> Any:
    """A client that retries by itself. Raises InputError without the package or without a key."""
    try:
        import openai
    except ImportError:
        raise InputError("srit demos needs the openai package: pip install 'srit[teacher]'"
                         ) from None
    base_url = cfg.base_url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get(cfg.api_key_variable)
    if not key and not base_url:
        raise InputError(f"the environment variable {cfg.api_key_variable} holds no key; set it, "
                         "or give the --base_url of a server that needs none")
    return openai.OpenAI(api_key=key or "none", base_url=base_url, max_retries=cfg.max_retries,
                         timeout=cfg.timeout)


def ask(client: Any, cfg: DemosConfig, row: dict) -> Answer:
    """One question to the teacher."""
    reply = client.chat.completions.create(
        model=cfg.model, messages=question_messages(row, "cot"), temperature=cfg.temperature,
        max_tokens=cfg.max_new_tokens)
    if not reply.choices:
        return "", "empty"
    return reply.choices[0].message.content or "", reply.choices[0].finish_reason or "stop"


REFUSED = (401, 403, 404)  # what the server will say to every question: wrong key, model, address
REJECTED = (400, 413, 422)  # what it will always say to this question: too long, filtered


def collect(questions: list[dict], path: Path, answer: Callable[[dict], Answer],
            concurrency: int) -> dict[str, str]:
    """Append an answer for every question to `path`; returns what failed, as {id: reason}.

    Raises InputError at the first error that would meet every question alike.
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
                raise InputError(f"{file}: id {row['id']!r} stands already in another file")
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
                         "the same command asks again")

    demos, counts = make_demos(list(questions.values()), read_answers(path), cfg.model)
    if not demos:
        raise InputError(f"no usable answer: {counts}")
    write_jsonl(Path(cfg.output_dir) / "demos.jsonl", demos)
    right = sum(grade(row["completion"], row).correct for row in demos)
    print(counts, f"right answers: {right:,} of {len(demos):,}", sep="\n")
    write_run(cfg.output_dir, "demos", cfg, [counts], started, right=right)


def read_answers(path: Path) -> dict[str, dict]:
    """{question id: line of answers.jsonl}, empty before the first answer."""
    if not path.is_file() or not path.stat().st_size:
        return {}
    return {row["id"]: row for row in read_jsonl(path)}


def make_demos(questions: list[dict], answers: dict[str, dict],
               teacher: str) -> tuple[list[dict], Counts]:
    """Demonstrations in the order of the questions, without cut, empty and rejected ones."""
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
