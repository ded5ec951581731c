"""`srit data`: convert published data sets to question rows.

Each function below reads a record of the files that the authors published, and of the tables that the
Hub serves. Without --input a set is fetched from the Hub, as `PUBLISHED` says: at one commit, with
checksums where they are known. Splits and licences are those of the data sets.

name         fields read
gsm8k        question answer
svamp        Body Question Answer
asdiv        body question answer
math         problem solution (or answer)
multiarith   sQuestion lSolutions, or question final_ans; addsub, singleeq, singleop likewise
aqua         question options correct
csqa         question choices answerKey; obqa, arc likewise
piqa         goal sol1 sol2 label; labels may be in a file of their own: --labels train-labels.lst
siqa         context question answerA ... label; likewise
mmlu         question choices answer; <subject>_test.csv: question A B C D answer, without a header

synthetic      the demo's word problems, each with a teacher's demonstration
reasoning_gym  tasks of that library (extra `reasoning_gym`) of which the judge can hold the truth
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srit.commands.config import DataConfig
from srit.commands.demo_data import generate
from srit.commands.published import PUBLISHED
from srit.data.file_formats import csv_lines
from srit.data.questions import check_question
from srit.data.sources import read_rows
from srit.grading import numerals
from srit.grading.final_answer import BOX, final_answer
from srit.grading.tasks import expression
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, parse_rows, write_jsonl

LETTERS = "ABCDEFGHIJ"
MMLU = ("question", "A", "B", "C", "D", "answer")  # of its CSV files, which have no header
# Tasks of reasoning_gym with one right answer that ours can hold.
GYM = {
    **dict.fromkeys(("aiw", "basic_arithmetic", "chain_sum", "count_bits", "count_primes",
                     "decimal_chain_sum", "dice", "gcd", "gsm_symbolic", "lcm", "leg_counting",
                     "letter_counting", "number_sequence", "products", "simple_equations"), "math"),
    **dict.fromkeys(("caesar_cipher", "family_relationships", "isomorphic_strings", "needle_haystack",
                     "spell_backward", "syllogism"), "exact"),
}
Raw = tuple[str, dict]  # place (for messages), record


class NoTruth(Exception):
    """The record has no ground truth, as in a hidden test set, or none that a task can hold."""


def number(value: Any) -> str:
    """The last number as text: "1,234.0" and 1234.0 give "1234"."""
    found = numerals.numbers(str(value))
    if not found:
        raise NoTruth
    return numerals.show(found[-1])


def math(question: str, answer: Any) -> dict:
    return {"task": "math", "question": " ".join(question.split()), "answer": number(answer)}


def choice(question: str, options: list[str], answer: int) -> dict:
    """`answer` is the index of the right option."""
    if not 0 <= answer < len(options):
        raise NoTruth
    choices = dict(zip(LETTERS, (" ".join(o.split()) for o in options), strict=False))
    return {"task": "choice", "question": " ".join(question.split()), "choices": choices,
            "answer": LETTERS[answer]}


def gsm8k(raw: dict) -> dict:
    return math(raw["question"], raw["answer"].rpartition("####")[2])


def gsm8k_demo(raw: dict, marked: bool) -> dict:
    """The human rationale as a demonstration; marks are what a calculator was asked: <<48/2=24>>."""
    text, _, answer = raw["answer"].rpartition("####")
    text = text.strip() if marked else re.sub("<<[^<>]*>>", "", text).strip()
    return {**gsm8k(raw), "teacher": "human", "completion": f"{text}\nThe answer is {answer.strip()}."}


def svamp(raw: dict) -> dict:
    body = raw["Body"].strip()
    return math(f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {raw['Question']}",
                raw["Answer"])


def asdiv(raw: dict) -> dict:
    """The unit behind an answer goes: 9 (apples). Answers of none or several numbers are left out."""
    answer = re.sub(r"\([^()]*\)$", "", raw["answer"].strip())
    if numerals.number(answer) is None:
        raise NoTruth
    return math(f"{raw['body'].strip()} {raw['question']}", answer)


def mawps(raw: dict) -> dict:
    if "final_ans" in raw:
        return math(raw["question"], raw["final_ans"])
    return math(raw["sQuestion"], raw["lSolutions"][0])


def competition(raw: dict) -> dict:
    """MATH: in the last box of the solution is a number, or an expression that math-verify reads."""
    answer = raw.get("answer")
    if answer is None and (boxes := [box.start() for box in BOX.finditer(raw["solution"])]):
        answer = final_answer(raw["solution"][boxes[-1] :])[0]
    row = {"task": "math", "question": raw["problem"].strip(), "answer": answer}
    if answer is not None and numerals.number(answer) is None:
        row["task"] = "expression"
        expression.parse("1")  # an error where math-verify is not installed
        try:
            expression.check(row, "")
        except InputError:
            answer = None
    if answer is None:
        raise NoTruth
    return row


def aqua(raw: dict) -> dict:
    options = [option.partition(")")[2] for option in raw["options"]]
    return choice(raw["question"], options, LETTERS.index(raw["correct"]))


def stem_choices(raw: dict) -> dict:
    """CommonsenseQA, OpenBookQA and ARC. Some of ARC's labels are 1 to 4 instead of A to D."""
    question, choices = raw.get("question_stem") or raw["question"], raw.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):  # the Hub's tables have columns
        labels, texts = choices["label"], choices["text"]
    else:
        labels, texts = ([option[key] for option in choices] for key in ("label", "text"))
    if raw.get("answerKey") not in labels:
        raise NoTruth
    return choice(question, texts, labels.index(raw["answerKey"]))


def piqa(raw: dict) -> dict:
    return choice(raw["goal"], [raw["sol1"], raw["sol2"]], int(raw.get("label", -1)))


def siqa(raw: dict) -> dict:
    """Labels run from 1 to 3."""
    return choice(f"{raw['context']} {raw['question']}",
                  [raw["answerA"], raw["answerB"], raw["answerC"]], int(raw.get("label", 0)) - 1)


def mmlu(raw: dict) -> dict:
    if "choices" in raw:
        return choice(raw["question"], raw["choices"], raw["answer"])
    return choice(raw["question"], [raw[letter] for letter in "ABCD"],
                  LETTERS.index(raw["answer"].strip()))


def gym(raw: dict) -> dict:
    return {key: raw[key] for key in ("task", "question", "answer")}


FORMATS: dict[str, Callable[[Any], dict]] = {
    "gsm8k": gsm8k, "svamp": svamp, "asdiv": asdiv, "math": competition, "multiarith": mawps,
    "addsub": mawps, "singleeq": mawps, "singleop": mawps, "aqua": aqua, "csqa": stem_choices,
    "obqa": stem_choices, "arc": stem_choices, "piqa": piqa, "siqa": siqa, "mmlu": mmlu,
    "reasoning_gym": gym,
}


def read_records(name: str, source: str) -> list[Raw]:
    path = Path(source)
    if name == "mmlu" and path.suffix == ".csv" and path.is_file():
        with open(path, "rb") as handle:
            return parse_rows(path, csv_lines(path, handle, MMLU))
    return read_rows(source)


def gym_records(tasks: Sequence[str], num_rows: int, seed: int) -> Iterator[Raw]:
    """Questions of reasoning_gym, of each task in turn."""
    try:
        from reasoning_gym import create_dataset
    except ImportError:
        raise InputError("--name reasoning_gym: pip install 'srit[reasoning_gym]'") from None
    if unknown := sorted({*tasks} - {*GYM}):
        raise InputError(f"--tasks {unknown[0]}: must be of {sorted(GYM)}")
    size = -(-num_rows // len(tasks))
    made = [create_dataset(task, size=size, seed=seed) for task in tasks]
    for number in range(num_rows):
        at, which = divmod(number, len(tasks))
        item = made[which][at]
        yield f"{tasks[which]}: question {at}", {**item, "task": GYM[tasks[which]]}


def with_labels(records: list[Raw], file: str) -> list[Raw]:
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    labels = path.read_text(encoding="utf-8", errors="replace").split()
    if len(labels) != len(records):
        raise InputError(f"{path}: {len(labels):,} labels for {len(records):,} records")
    return [(where, dict(raw, label=label))
            for (where, raw), label in zip(records, labels, strict=True)]


def convert(name: str, records: Sequence[Raw], prefix: str,
            rationales: str = "none") -> tuple[list[dict], Counts]:
    """Question rows, or demonstrations with rationales (`plain` or `marked`).

    Records without ground truth and repeated questions are dropped and counted. Raises InputError for
    a record that is not in this data set's format.
    """
    rows, counts, seen = [], Counts("records"), set()
    to_row = FORMATS[name]
    if rationales != "none":
        to_row = partial(gsm8k_demo, marked=rationales == "marked")
    for at, (where, raw) in enumerate(records):
        try:
            row = {"id": f"{prefix}-{at}", **to_row(raw)}
        except NoTruth:
            counts.drop("without ground truth")
            continue
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: does not look like a record of {name} "
                             f"({type(error).__name__}: {error})") from None
        check_question(row, where)
        key = json.dumps([row["question"], row.get("choices")])
        if key in seen:
            counts.drop("repeated")
            continue
        seen.add(key)
        counts.use()
        rows.append(row)
    return rows, counts


def main(cfg: DataConfig) -> None:
    started = time.time()
    if cfg.rationales != "none" and cfg.name != "gsm8k":
        raise InputError(f"--rationales {cfg.rationales}: {cfg.name} has none, gsm8k does")
    if cfg.name == "synthetic":
        rows, counts = generate(cfg.num_rows, cfg.seed, cfg.domain), Counts("questions")
        counts.use(len(rows))
    elif cfg.name == "reasoning_gym":
        records = list(gym_records(cfg.tasks or list(GYM), cfg.num_rows, cfg.seed))
        rows, counts = convert(cfg.name, records, f"{cfg.name}-{cfg.seed}")
    else:
        if cfg.input is None and cfg.name not in PUBLISHED:
            raise InputError(f"--name {cfg.name} needs --input, the published file")
        sources = [cfg.input] if cfg.input else PUBLISHED[cfg.name].fetch(cfg.split)
        records = [record for source in sources for record in read_records(cfg.name, source)]
        if cfg.labels:
            records = with_labels(records[: cfg.limit], cfg.labels)
        part = re.split("[/:]", sources[0].rstrip("/"))[-1].partition(".")[0]
        rows, counts = convert(cfg.name, records[: cfg.limit], f"{cfg.name}-{part}", cfg.rationales)
        if not rows:
            raise InputError(f"{', '.join(sources)}: no question with ground truth ({counts})")
    write_jsonl(cfg.output, rows)
    print(counts, f"{cfg.output}: {len(rows):,} questions, {time.time() - started:.1f} s", sep="\n")
