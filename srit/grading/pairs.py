"""Preference pairs from graded samples: the pairing policies, and why a question gave no pair.

w is the preferred (chosen) answer, l the dispreferred (rejected) one. Each question is handled alone,
with a random generator seeded by (seed, question id), so the order of the input does not matter.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from srit.config import QuestionConfig
from srit.grading.judge import load_judge
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts
from srit.text.prompts import DEFAULT, Message, question_messages


@dataclass(frozen=True)
class Candidate:
    """One answer to a question, and where it comes from."""

    text: str
    style: str  # direct or cot
    source: str  # self or teacher
    sample: int | None
    extracted: str | None
    correct: bool
    score: float  # 1 for right and 0 for wrong, unless a verifier scores
    forced: list[list[int]] = field(default_factory=list)  # spans of the text, see `render`


def paper(own: list[Candidate], teacher: list[Candidate]) -> tuple[list, list, str]:
    """w: a right CoT answer of the student, else the teacher's. l: an answer to the direct prompt.

    arXiv 2405.00402. A right l teaches style, not truth; `summarize_pairs` counts these pairs.
    """
    right = [c for c in own if c.style == "cot" and c.correct]
    direct = [c for c in own if c.style == "direct"]
    return right or teacher, direct, _why(right or teacher, direct, "no answer without CoT prompt")


def correctness(own: list[Candidate], teacher: list[Candidate]) -> tuple[list, list, str]:
    """w: a right CoT answer of the student. l: a wrong one to the same prompt (arXiv 2407.18248)."""
    cot = [c for c in own if c.style == "cot"]
    right, wrong = [c for c in cot if c.correct], [c for c in cot if not c.correct]
    return right, wrong, _why(right, wrong, "every CoT answer right")


def mixed(own: list[Candidate], teacher: list[Candidate]) -> tuple[list, list, str]:
    """w: as in `paper`. l: any wrong answer of the student, with or without the CoT prompt."""
    right = [c for c in own if c.style == "cot" and c.correct]
    wrong = [c for c in own if not c.correct]
    return right or teacher, wrong, _why(right or teacher, wrong, "every answer right")


def scored(own: list[Candidate], teacher: list[Candidate]) -> tuple[list, list, str]:
    """w and l: two CoT answers of the student; `min_margin` says how much better w must score."""
    cot = [c for c in own if c.style == "cot"]
    return cot, cot, "" if cot else "no CoT answer"


POLICIES = {"paper": paper, "correctness": correctness, "mixed": mixed, "scored": scored}


def _why(chosen: list[Candidate], rejected: list[Candidate], none_rejected: str) -> str:
    if not chosen:
        return "no right answer to prefer"
    return "" if rejected else none_rejected


def build_pairs(samples: Sequence[dict], demos: Sequence[dict], policy: str = "paper",
                pair_prompt: str = "cot", selection: str = "uniform", max_pairs_per_question: int = 1,
                seed: int = 0, cfg: QuestionConfig = DEFAULT,
                min_margin: float = 0.0) -> tuple[list[dict], list[Counts]]:
    """Preference pairs, and the counts of samples and of questions.

    Args:
        samples: graded rows of train/sample.py. What was forced in them stays marked in the pairs.
        demos: teacher demonstrations of the same questions; wrong ones are ignored.
        pair_prompt: prompt style of the pair's prompt.
        selection: which possible pairs to keep: `uniform`, or `closest_length` (in characters).
        cfg: the pair's prompt, as of `question_messages`, and the judge of demonstrations.
        min_margin: w scores at least so much more than l, and not less.
    Raises InputError for an unknown policy, if one sample has two different texts, and if one id
    stands for two questions.
    """
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r}: must be one of {', '.join(POLICIES)}")
    questions, own, sample_counts = _usable(samples)
    judge = load_judge(cfg)
    teacher: dict[str, list[Candidate]] = defaultdict(list)
    for row in demos:
        _check_same_question(questions.get(row["id"], row), row)
        found = judge(row["completion"], row)
        if found.correct:
            score = 1.0 if found.score is None else found.score
            teacher[row["id"]].append(Candidate(row["completion"].strip(), "cot", "teacher", None,
                                                found.extracted, True, score))
    pairs, counts = [], Counts("questions")
    for key in sorted(questions):
        chosen, rejected, why = POLICIES[policy](own[key], teacher[key])
        possible = [(w, r) for w in chosen for r in rejected
                    if " ".join(w.text.split()) != " ".join(r.text.split())]
        apart = [(w, r) for w, r in possible if round(w.score - r.score, 9) >= min_margin]
        if why or not apart:
            counts.drop(why or ("chosen and rejected are the same text" if not possible else
                                f"no two scores {min_margin} apart"))
            continue
        counts.use()
        picked = _select(apart, selection, max_pairs_per_question, f"{seed} {key}")
        prompt = question_messages(questions[key], pair_prompt, cfg)
        pairs += [_row(questions[key], prompt, w, r, policy, n)
                  for n, (w, r) in enumerate(picked)]
    return pairs, [sample_counts, counts]


def _usable(samples: Sequence[dict]) -> tuple[dict, dict, Counts]:
    """Questions, and their finished, non-empty and distinct answers."""
    counts = Counts("samples")
    questions: dict[str, dict] = {}
    own: dict[str, list[Candidate]] = defaultdict(list)
    seen: dict[tuple, str] = {}
    texts: set[tuple[str, str]] = set()
    for row in sorted(samples, key=lambda r: (r["id"], r["prompt_style"], r["sample"], r["text"],
                                               r.get("forced") or [])):
        key = row["id"], row["prompt_style"], row["sample"]
        if seen.setdefault(key, row["text"]) != row["text"]:
            raise InputError(f"two different texts for question {key[0]!r}, style {key[1]}, sample "
                             f"{key[2]}: do the files come from different runs?")
        _check_same_question(questions.setdefault(row["id"], row), row)
        distinct = row["id"], " ".join(row["text"].split())
        if not row["finished"]:
            counts.drop("cut off at max_new_tokens")
        elif not distinct[1]:
            counts.drop("empty")
        elif distinct in texts:
            counts.drop("duplicate text")
        else:
            counts.use()
            texts.add(distinct)
            text, forced = _stripped(row["text"], row.get("forced") or [])
            own[row["id"]].append(Candidate(text, row["prompt_style"], "self", row["sample"],
                                            row["extracted"], row["correct"],
                                            row.get("score", float(row["correct"])), forced))
    return questions, own, counts


def _stripped(text: str, forced: list[list[int]]) -> tuple[str, list[list[int]]]:
    """The text without whitespace around it, and its forced spans there."""
    answer = text.strip()
    shift = text.index(answer)
    spans = [[max(start - shift, 0), min(end - shift, len(answer))] for start, end in forced]
    return answer, [[start, end] for start, end in spans if start < end]


def _check_same_question(first: dict, row: dict) -> None:
    if (first["question"], first["answer"]) != (row["question"], row["answer"]):
        raise InputError(f"id {row['id']!r} stands for two questions, {first['question']!r:.80} and "
                         f"{row['question']!r:.80}: do the files come from different data sets?")


def _select(possible: list[tuple[Candidate, Candidate]], selection: str, most: int,
            seed: str) -> list[tuple[Candidate, Candidate]]:
    random.Random(seed).shuffle(possible)
    if selection == "closest_length":
        possible.sort(key=lambda pair: abs(len(pair[0].text) - len(pair[1].text)))
    picked: list[tuple[Candidate, Candidate]] = []
    for w, r in possible:
        # A text twice on the same side would count double.
        if len(picked) < most and all(w is not a and r is not b for a, b in picked):
            picked.append((w, r))
    return picked


def _row(question: dict, prompt: list[Message], w: Candidate, r: Candidate, policy: str,
         number: int) -> dict:
    def turn(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    return {
        "id": question["id"] if number == 0 else f"{question['id']}#{number}",
        "prompt": prompt,
        "chosen": turn(w.text), "rejected": turn(r.text), "policy": policy,
        "answer": question["answer"], "chosen_source": w.source, "chosen_style": w.style,
        "chosen_sample": w.sample, "chosen_extracted": w.extracted, "chosen_score": w.score,
        "rejected_style": r.style, "rejected_sample": r.sample,
        "rejected_extracted": r.extracted, "rejected_correct": r.correct,
        "rejected_score": r.score,
    } | {f"{side}_forced": c.forced for side, c in (("chosen", w), ("rejected", r)) if c.forced}


def summarize_pairs(pairs: Sequence[dict]) -> dict[str, float]:
    """Origin, correctness and length of the two sides of all pairs."""
    return {
        "pairs": len(pairs),
        "chosen_from_teacher": sum(p["chosen_source"] == "teacher" for p in pairs),
        "rejected_correct": sum(p["rejected_correct"] for p in pairs),
        "rejected_direct": sum(p["rejected_style"] == "direct" for p in pairs),
        "with_forced_text": sum("chosen_forced" in p or "rejected_forced" in p for p in pairs),
        "chosen_mean_characters": round(mean(len(p["chosen"][0]["content"]) for p in pairs), 1),
        "rejected_mean_characters": round(mean(len(p["rejected"][0]["content"]) for p in pairs), 1),
    }
