"""Statistics of evaluation: accuracies with their uncertainty, as pure functions.

A generation is one graded row: `id`, `sample`, `correct`, `correct_strict`, `extracted`, `finished`,
`n_tokens`. Accuracy means the flexible one unless it says strict (see answers.py).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


def wilson_interval(correct: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default.

    Unlike p ± z·sqrt(p(1-p)/n), it also holds for small n and for p near 0 or 1.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples is right, estimated from n of which c are right.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. (arXiv 2107.03374, eq. 1).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right; in a tie the first to appear wins.

    Samples without an answer do not vote. A question without votes counts as wrong.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # ties keep the order of appearance
    return correct[list(answers).index(winner)]


@dataclass(frozen=True)
class Paired:
    """Two models on the same n questions: right in both, in only one, and McNemar's p-value."""

    n: int
    both: int
    only_a: int
    only_b: int
    p_value: float

    @property
    def difference(self) -> float:
        """Accuracy of b minus accuracy of a."""
        return (self.only_b - self.only_a) / self.n


def compare(a: Mapping[str, bool], b: Mapping[str, bool]) -> Paired:
    """Exact two-sided McNemar test (1947) of two models' results by question.

    Only questions that exactly one of them got right count. If both are equally good, each of these
    is a fair coin flip, so p = min(1, 2 · P(Binomial(only_a + only_b, 1/2) <= min(only_a, only_b))).
    Raises ValueError unless both answered the same questions.
    """
    if a.keys() != b.keys() or not a:
        raise ValueError(f"not the same questions: {len(a)} and {len(b)}, "
                         f"{len(a.keys() & b.keys())} in common")
    both = sum(a[key] and b[key] for key in a)
    only_a = sum(a[key] and not b[key] for key in a)
    only_b = sum(b[key] and not a[key] for key in a)
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return Paired(len(a), both, only_a, only_b, min(1.0, 2 * tail / 2**n))


def summarize_generations(rows: Iterable[dict]) -> dict:
    """Accuracy of a set of generations, with its interval, and how they ended; their mean score, if a
    verifier scored them.

    With several samples per question, accuracy is their mean. n and the interval still count
    questions, because samples of one question are not independent; pass@k (k = 1, 2, 4, ... and all)
    and maj@k are added.
    """
    rows = list(rows)
    questions: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        questions[row["id"]].append(row)
    n, total = len(questions), max(1, len(rows))
    accuracy = sum(row["correct"] for row in rows) / total
    result = {
        "n": n,
        "accuracy": accuracy,
        "accuracy_strict": sum(row["correct_strict"] for row in rows) / total,
        "interval": list(wilson_interval(accuracy * n, n)),
        "unparsed": sum(row["extracted"] is None for row in rows),
        "finish_rate": sum(row["finished"] for row in rows) / total,
        "mean_tokens": sum(row["n_tokens"] for row in rows) / total,
    }
    if rows and all("score" in row for row in rows):
        result["score"] = sum(row["score"] for row in rows) / total
    samples = min((len(group) for group in questions.values()), default=0)
    if samples < 2:
        return result
    result["samples"] = samples
    groups = [sorted(group, key=lambda row: row["sample"]) for group in questions.values()]
    for k in sorted({2**i for i in range(samples.bit_length()) if 2**i < samples} | {samples}):
        passed = [pass_at_k(len(g), sum(row["correct"] for row in g), k) for g in groups]
        result[f"pass@{k}"] = sum(passed) / n
    voted = [majority_correct([row["extracted"] for row in g[:samples]],
                              [row["correct"] for row in g[:samples]]) for g in groups]
    result[f"maj@{samples}"] = sum(voted) / n
    return result


def pool(files: Sequence[dict]) -> dict | None:
    """Pool files: `accuracy` over questions, `macro_accuracy` over files. None if there are none."""
    n = sum(file["n"] for file in files)
    if n == 0:
        return None

    def mean(key: str) -> float:
        return sum(file[key] * file["n"] for file in files) / n

    accuracy = mean("accuracy")
    return {"n": n, "accuracy": accuracy, "accuracy_strict": mean("accuracy_strict"),
            "interval": list(wilson_interval(accuracy * n, n)),
            "macro_accuracy": sum(file["accuracy"] for file in files) / len(files)}


def accuracy_rows(results: Sequence[dict]) -> list[dict]:
    """The accuracy table of several models: data sets, in-domain ones first, then pooled domains.

    Args:
        results: results.json (train/eval.py) of each model.
    Returns:
        Rows of `name`, `in_domain` (None if no domain was named), `datasets`, `pooled`, `n`, and
        `cells`: per model its `accuracy`, `accuracy_strict` and `interval`, None without evaluation.
    """
    files = [list(result["files"].values()) for result in results]
    domains = {file["dataset"]: file["in_domain"] for own in files for file in own}
    names = sorted(domains, key=lambda name: domains[name] is False)
    groups = [(name, domains[name], [name], False) for name in names]
    for title, inside in (("all in domain", True), ("all out of domain", False)):
        if members := [name for name in names if domains[name] is inside]:
            groups.append((title, inside, members, True))
    rows = []
    for name, inside, members, pooled in groups:
        cells = [pool([file for file in own if file["dataset"] in members]) for own in files]
        rows.append({"name": name, "in_domain": inside, "datasets": members, "pooled": pooled,
                     "n": max(cell["n"] for cell in cells if cell), "cells": cells})
    return rows
