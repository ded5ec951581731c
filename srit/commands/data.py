"""`srit data`: convert the published files of data sets to question rows.

name         published file                                           fields read
gsm8k        train.jsonl, test.jsonl (openai/grade-school-math)       question answer
svamp        SVAMP.json (arkilpatel/SVAMP)                            Body Question Answer
multiarith   MultiArith.json; addsub, singleeq, singleop likewise     sQuestion lSolutions
aqua         train.json, dev.json, test.json (google-deepmind/AQuA)   question options correct
csqa         train_rand_split.jsonl ... (CommonsenseQA)               question answerKey
obqa, arc    train.jsonl ... (allenai's OpenBookQA and ARC)           question answerKey
piqa         train.jsonl, and --labels train-labels.lst               goal sol1 sol2
siqa         train.jsonl, and --labels train-labels.lst               context question answerA ...
mmlu         <subject>_test.csv, without a header                     question A B C D answer
synthetic    none: the demo's word problems, each with a teacher's demonstration

Licences and splits are those of the data sets. Nothing is downloaded unless --input names a hub file.
"""

import csv
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from srit.commands.config import DataConfig
from srit.commands.demo_data import generate
from srit.data.questions import check_question
from srit.grading.numerals import numbers, show
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, read_lines, write_jsonl
from srit.runtime.limits import parse_json

LETTERS = "ABCDEFGHIJ"
Raw = tuple[str, Any]  # place (for messages), record


class NoTruth(Exception):
    """The record has no ground truth, as in a hidden test set."""


def number(value: Any) -> str:
    """The last number as text: "1,234.0" and 1234.0 give "1234"."""
    found = numbers(str(value))
    if not found:
        raise NoTruth
    return show(found[-1])


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


def mawps(raw: dict) -> dict:
    return math(raw["sQuestion"], raw["lSolutions"][0])


def aqua(raw: dict) -> dict:
    options = [option.partition(")")[2] for option in raw["options"]]
    return choice(raw["question"], options, LETTERS.index(raw["correct"]))


def stem_choices(raw: dict) -> dict:
    """CommonsenseQA, OpenBookQA and ARC. Some of ARC's labels are 1 to 4 instead of A to D."""
    question = raw["question"]
    labels = [option["label"] for option in question["choices"]]
    if raw.get("answerKey") not in labels:
        raise NoTruth
    return choice(question["stem"], [option["text"] for option in question["choices"]],
                  labels.index(raw["answerKey"]))


def piqa(raw: dict) -> dict:
    return choice(raw["goal"], [raw["sol1"], raw["sol2"]], int(raw.get("label", -1)))


def siqa(raw: dict) -> dict:
    """Labels run from 1 to 3."""
    return choice(f"{raw['context']} {raw['question']}",
                  [raw["answerA"], raw["answerB"], raw["answerC"]], int(raw.get("label", 0)) - 1)


def mmlu(raw: list[str]) -> dict:
    question, *options, answer = raw
    return choice(question, options, LETTERS.index(answer.strip()))


FORMATS: dict[str, Callable[[Any], dict]] = {
    "gsm8k": gsm8k, "svamp": svamp, "multiarith": mawps, "addsub": mawps, "singleeq": mawps,
    "singleop": mawps, "aqua": aqua, "csqa": stem_choices, "obqa": stem_choices,
    "arc": stem_choices, "piqa": piqa, "siqa": siqa, "mmlu": mmlu,
}


def read_raw(path: Path) -> Iterator[Raw]:
    """Records of a .csv, .json or JSON Lines file, with their places."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as handle:
                for at, row in enumerate(csv.reader(handle), 1):
                    yield f"{path}:{at}", row
            return
        records = parse_json(path.read_bytes(), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error})") from None
    except InputError as error:
        if not isinstance(error.__context__, json.JSONDecodeError):
            raise
        yield from read_lines(path)  # more than one value: JSON Lines
        return
    records = records if isinstance(records, list) else [records]
    for at, record in enumerate(records, 1):
        yield f"{path}: record {at}", record


def with_labels(records: list[Raw], file: str) -> list[Raw]:
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    labels = path.read_text(encoding="utf-8", errors="replace").split()
    if len(labels) != len(records):
        raise InputError(f"{path}: {len(labels):,} labels for {len(records):,} records")
    return [(where, dict(raw, label=label) if isinstance(raw, dict) else raw)
            for (where, raw), label in zip(records, labels, strict=True)]


def convert(name: str, records: list[Raw], prefix: str,
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


def fetch(name: str) -> Path:
    """Path of a local file, or of hub:OWNER/NAME:FILE after downloading it."""
    if not name.startswith("hub:"):
        return Path(name)
    repository, _, file = name.removeprefix("hub:").partition(":")
    if not file:
        raise InputError(f"--input {name}: write it as hub:OWNER/NAME:FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # no network, no such repository, no such file, no permission
        raise InputError(f"--input {name}: {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:300]}") from None


def main(cfg: DataConfig) -> None:
    started = time.time()
    if cfg.rationales != "none" and cfg.name != "gsm8k":
        raise InputError(f"--rationales {cfg.rationales}: {cfg.name} has none, gsm8k does")
    if cfg.name == "synthetic":
        rows, counts = generate(cfg.num_rows, cfg.seed, cfg.domain), Counts("questions")
        counts.use(len(rows))
    else:
        if cfg.input is None:
            raise InputError(f"--name {cfg.name} needs --input, the published file")
        path = fetch(cfg.input)
        records = list(read_raw(path))[: cfg.limit]
        if cfg.labels:
            records = with_labels(records, cfg.labels)
        rows, counts = convert(cfg.name, records, f"{cfg.name}-{path.stem}", cfg.rationales)
        if not rows:
            raise InputError(f"{path}: no question with ground truth ({counts})")
    write_jsonl(cfg.output, rows)
    print(counts, f"{cfg.output}: {len(rows):,} questions, {time.time() - started:.1f} s", sep="\n")
