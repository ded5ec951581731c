"""`srit demos`: get demonstrations from a teacher behind an OpenAI-compatible server.

Every question is asked with the chain-of-thought prompt of the other stages. Answers are appended to
answers.jsonl as they arrive, so a resumed run asks only what is missing or was rejected; demos.jsonl is
written at the end. Wrong answers are kept: `srit sft` filters them by ground truth.
"""

import asyncio
import dataclasses
import itertools
import json
import os
import re
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from srit.commands.config import DemosConfig
from srit.data.inputs import stage_inputs
from srit.data.questions import read_questions
from srit.grading.judge import load_judge
from srit.runtime import shutdown
from srit.runtime.files import InputError, sha256
from srit.runtime.jsonl import (
    Counts,
    cut_torn_line,
    has_rows,
    read_jsonl,
    read_lines,
    require,
    write_jsonl,
)
from srit.runtime.limits import ROW_BYTES, parse_json
from srit.runtime.outcome import Failed, Stopped
from srit.runtime.run_dir import Run, read_run
from srit.text.prompts import question_messages

Answer = tuple[str, str]  # text, finish reason

# HTTP status of an error that all questions share (wrong key, model, address), of one that only this
# question has (too long, filtered), and of a server that may answer later.
REFUSED, REJECTED = (401, 403, 404), (400, 413, 422)
BUSY = (408, 409, 429, *range(500, 600))
CREDENTIALS = re.compile("//(.*)@")  # up to the last @: a password may hold anything


def address(cfg: DemosConfig) -> str:
    return cfg.base_url or os.environ.get("OPENAI_BASE_URL", "")


def api_key(cfg: DemosConfig) -> str:
    return os.environ.get(cfg.api_key_variable, "").strip()


def connect(cfg: DemosConfig) -> Any:
    """A client for the server. Raises InputError if the package or the key is missing."""
    try:
        import openai
    except ImportError:
        raise InputError("srit demos needs the openai package: pip install 'srit[teacher]'"
                         ) from None
    url, key = address(cfg), api_key(cfg)
    if not key and not url:
        raise InputError(f"the environment variable {cfg.api_key_variable} holds no key; set it, or "
                         "give the --base_url of a server that needs none")
    try:
        parts = urlsplit(url)
        good = not url or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:  # a bad port or bracket
        good = False
    if not good:  # not shown: it may hold a password
        raise InputError("the server's address must look like http://host:port/v1; special characters "
                         "in a password are written as %XX")
    # `ask` retries and bounds the time: the client's timeout is for each read, not for the answer.
    return openai.AsyncOpenAI(api_key=key or "none", base_url=url or None, max_retries=0, timeout=None)


def one_line(cfg: DemosConfig) -> Callable[[BaseException], str]:
    """A function that describes an error in one short line without the key or credentials."""
    secrets = [api_key(cfg)]
    if found := CREDENTIALS.search(address(cfg)):
        user, _, password = found[1].partition(":")
        basic = b64encode(unquote(found[1]).encode()).decode()
        secrets += [found[1], basic, password or user, unquote(password or user)]
    pattern = "|".join(re.escape(secret) for secret in sorted(secrets, key=len, reverse=True) if secret)

    def describe(error: BaseException) -> str:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        if error.__cause__:  # of the client's bare "Connection error."
            text += f" ({error.__cause__})"
        text = re.sub(pattern, "***", text) if pattern else text
        return " ".join(text.encode("utf-8", "replace").decode().split())[:300]

    return describe


async def ask(client: Any, cfg: DemosConfig, row: dict) -> Answer:
    """Ask the teacher one question, again with back-off if the connection fails or the server is busy.

    Raises InputError for a reply without an answer, and what the client raises.
    """
    body = {"model": cfg.model, "messages": question_messages(row, "cot", cfg),
            "temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
    for attempt in itertools.count():
        try:
            reply = await asyncio.wait_for(
                client.post("/chat/completions", body=body, cast_to=str), cfg.timeout)
            break
        except Exception as error:
            if isinstance(error, asyncio.TimeoutError):
                error = TimeoutError(f"no whole answer within {cfg.timeout:g} seconds (--timeout)")
            if attempt == cfg.max_retries or getattr(error, "status_code", 500) not in BUSY:
                raise error
            pause = _retry_after(error) or min(8.0, 0.5 * 2**attempt)
        await asyncio.sleep(pause)
    return read_answer(reply)


def _retry_after(error: Exception) -> float:
    try:
        return min(60.0, max(0.0, float(error.response.headers["retry-after"])))
    except (AttributeError, LookupError, ValueError):  # no reply, no such header, or a date
        return 0.0


def read_answer(reply: str) -> Answer:
    """The answer in the JSON of a chat completion. Raises InputError, with the reason, without one."""
    data = reply.encode()
    if len(data) > ROW_BYTES // 2:  # the row of demos.jsonl holds the question too
        raise InputError(f"the reply has {len(data):,} bytes, more than {ROW_BYTES // 2:,}")
    try:
        choice = parse_json(data, "the reply")["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason") or "stop"
    except (LookupError, TypeError):
        raise InputError(f"not a chat completion: {reply}") from None
    if not isinstance(text, str) or not isinstance(reason, str) or reason == "content_filter":
        raise InputError(f"no answer in {json.dumps(choice)}")
    return text, reason


async def collect(client: Any, cfg: DemosConfig, questions: list[dict], path: Path) -> dict[str, str]:
    """Append an answer or a rejection for every question to `path`; return {id: error} of the others.

    A requested shutdown ends it at once. Raises InputError at an error that all questions share.
    """
    failed: dict[str, str] = {}
    todo, asked, describe = deque(questions), itertools.count(1), one_line(cfg)

    async def work() -> None:
        while todo:
            row = todo.popleft()
            answer = {"id": row["id"], "completion": "", "finish_reason": "rejected"}
            try:
                answer["completion"], answer["finish_reason"] = await ask(client, cfg, row)
            except Exception as error:
                answer["error"], status = describe(error), getattr(error, "status_code", None)
                if status in REFUSED:
                    raise InputError(f"the server refuses: {answer['error']}") from None
                if status not in REJECTED and not isinstance(error, InputError):
                    failed[row["id"]] = answer["error"]
            if row["id"] not in failed:
                handle.write(json.dumps(answer, ensure_ascii=False) + "\n")
                handle.flush()
            if (number := next(asked)) % 100 == 0:
                print(f"{number:,} of {len(questions):,} asked, {len(failed):,} failed", flush=True)

    async with client:
        with open(path, "a", encoding="utf-8") as handle:
            workers = pending = [asyncio.create_task(work()) for _ in questions[: cfg.concurrency]]
            try:
                while pending and not shutdown.requested():
                    done, pending = await asyncio.wait(pending, timeout=0.2,
                                                       return_when=asyncio.FIRST_EXCEPTION)
                    for worker in done:
                        worker.result()
            finally:
                todo.clear()
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
    return failed


def main(cfg: DemosConfig, client: Any = None) -> None:
    recorded = cfg.base_url and CREDENTIALS.sub("//", cfg.base_url)
    run = Run("demos", dataclasses.replace(cfg, base_url=recorded), stage_inputs)
    questions: dict[str, dict] = {}
    for file in cfg.train_file:
        for row in read_questions(file, load_judge(cfg))[: cfg.limit]:
            if row["id"] in questions:
                raise InputError(f"{file}: duplicate id {row['id']!r}, also in another file")
            questions[row["id"]] = row
    client = client or connect(cfg)
    run.claim()

    path, demos_path = run.output_dir / "answers.jsonl", run.output_dir / "demos.jsonl"
    cut_torn_line(path)
    answers = read_answers(path)
    if demos_path.exists():
        # Ours if run.json has its hash, or if the run was killed between writing the two.
        ours = read_run(run.output_dir).get("outputs", {}).get("demos.jsonl")
        expected, _ = make_demos(questions, answers, cfg.model)
        if sha256(demos_path) != ours and read_jsonl(demos_path) != expected:
            raise InputError(f"{demos_path} was changed since, or never written by this run; move it "
                             "away, or choose another --output_dir")
    missing = [row for key, row in questions.items() if _rejected(answers.get(key))]
    print(f"{len(questions):,} questions, {len(questions) - len(missing):,} answered before")
    failed = asyncio.run(collect(client, cfg, missing, path))
    if shutdown.requested():
        raise Stopped(f"stopped: {path} has the answers so far; the same command asks the rest")
    if failed:
        raise Failed(f"{len(failed):,} of {len(questions):,} questions have no answer, the "
                     f"first because of: {next(iter(failed.values()))}; "
                     "the same command asks them again")

    answers = read_answers(path)
    demos, counts = make_demos(questions, answers, cfg.model)
    reasons = Counter(answers[key].get("error") for key in questions if _rejected(answers[key]))
    for reason, number in reasons.most_common(5):
        print(f"{number:,} rejected, to be asked again by the same command: {reason}")
    if not demos:
        raise InputError(f"no usable answer: {counts}")
    write_jsonl(demos_path, demos)
    right = sum(load_judge(cfg)(row["completion"], row).correct for row in demos)
    print(counts, f"right answers: {right:,} of {len(demos):,}", sep="\n")
    run.counts.append(counts)
    run.finish(["demos.jsonl"], right=right)


def read_answers(path: Path) -> dict[str, dict]:
    """{question id: its last row} of answers.jsonl."""
    rows = read_lines(path) if has_rows(path) else []
    for where, row in rows:
        for key in ("id", "completion", "finish_reason"):
            require(row, key, str, where)
    return {row["id"]: row for _, row in rows}


def _rejected(answer: dict | None) -> bool:
    """Whether a question has no answer yet, or a rejected one."""
    return answer is None or answer["finish_reason"] == "rejected"


def make_demos(questions: dict[str, dict], answers: dict[str, dict],
               teacher: str) -> tuple[list[dict], Counts]:
    """Demonstrations in the order of the questions. Cut, empty and rejected answers are dropped."""
    demos, counts = [], Counts("answers")
    for key, row in questions.items():
        answer = answers.get(key)
        if _rejected(answer):
            counts.drop("rejected")
        elif not answer["completion"].strip():
            counts.drop("empty")
        elif answer["finish_reason"] == "length":
            counts.drop("cut at max_new_tokens")
        else:
            counts.use()
            demos.append({**row, "teacher": teacher, "completion": answer["completion"].strip()})
    return demos, counts
