"""Published formats, and those of the Hub's tables, in records written for this test."""

import json
import re
import sys
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from hub import forget, serve, use

from srit.commands.data import GYM, DataConfig, main
from srit.commands.published import PUBLISHED
from srit.data.hub import HUB_SET
from srit.data.questions import read_demos, read_questions
from srit.grading.judge import grade
from srit.runtime.files import InputError, sha256

STEM = {"id": "x1", "answerKey": "B", "question": {
    "stem": "Where does a  ship sail?",
    "choices": [{"label": "A", "text": "wood"}, {"label": "B", "text": "sea"}]}}
NUMBERED = {"answerKey": "2", "question": {
    "stem": "Which one floats?",
    "choices": [{"label": "1", "text": "iron"}, {"label": "2", "text": "cork"}]}}
MAWPS = {"iIndex": 3, "sQuestion": " Nine plus  three? ", "lSolutions": [12.0]}
RECORDS = [
    ("gsm8k", {"question": "Two dozen hens lay how many eggs a week?",
               "answer": "24 * 50 = <<24*50=1200>>1200\n#### 1,200"}, "1200"),
    ("svamp", {"Body": "Lea had 9 kites and sold 2", "Question": "How many are left?",
               "Answer": 7.0}, "7"),
    ("multiarith", MAWPS, "12"), ("addsub", MAWPS, "12"), ("singleeq", MAWPS, "12"),
    ("singleop", {**MAWPS, "lSolutions": ["0.25"]}, "0.25"),
    ("aqua", {"question": "Half of 8?", "options": ["A)3", "B)4", "C)5"], "correct": "B"}, "B"),
    ("csqa", STEM, "B"), ("obqa", STEM, "B"), ("arc", NUMBERED, "B"),
    ("piqa", {"goal": "Cool soup", "sol1": "blow on it", "sol2": "boil it", "label": 0}, "A"),
    ("siqa", {"context": "Kim fell.", "question": "How does Kim feel?", "answerA": "fine",
              "answerB": "proud", "answerC": "hurt", "label": "3"}, "C"),
    # As the Hub serves them
    ("svamp", {"Body": "Lea had 9 kites and sold 2", "Question": "How many are left?",
               "Answer": "7", "ID": "chal-1"}, "7"),
    ("multiarith", {"question": "Nine plus three?", "final_ans": "12"}, "12"),
    ("asdiv", {"body": "Seven red apples and two green apples are in the basket.",
               "question": "How many apples are in the basket?", "answer": "9 (apples)"}, "9"),
    ("math", {"problem": "Half of $8$?", "solution": "Not \\boxed{1}, but $\\boxed{4}$."}, "4"),
    ("math", {"problem": "Half of $9$?", "solution": "It is \\boxed{\\frac{9}{2}}.",
              "answer": "4.5"}, "4.5"),
    ("csqa", {"question": "Where does a ship sail?", "answerKey": "B",
              "choices": {"label": ["A", "B"], "text": ["wood", "sea"]}}, "B"),
    ("obqa", {"question_stem": "Which one floats?", "answerKey": "A",
              "choices": {"label": ["A", "B"], "text": ["cork", "iron"]}}, "A"),
    ("arc", {"question": "Which one floats?", "answerKey": "2",
             "choices": {"label": ["1", "2"], "text": ["iron", "cork"]}}, "B"),
    ("mmlu", {"question": "Which is even?", "subject": "s", "choices": ["1", "3", "5", "8"],
              "answer": 3}, "D"),
]


def convert(tmp_path, name, content, suffix="jsonl", **changes):
    file = tmp_path / f"raw.{suffix}"
    file.write_text(content)
    output = tmp_path / "questions.jsonl"
    main(DataConfig(name=name, input=str(file), output=str(output), **changes))
    return read_questions(output)


@pytest.mark.parametrize(("name", "record", "answer"), RECORDS)
def test_every_format_is_converted(tmp_path, name, record, answer):
    (row,) = convert(tmp_path, name, json.dumps(record) + "\n")
    assert (row["id"], row["answer"]) == (f"{name}-raw-0", answer)
    assert "  " not in row["question"] and row["question"] == row["question"].strip()
    assert row["task"] == ("choice" if answer.isalpha() else "math")
    assert convert(tmp_path, name, json.dumps([record]), "json") == [row]


def test_texts_are_joined_as_published(tmp_path):
    (row,) = convert(tmp_path, "svamp", json.dumps(RECORDS[1][1]))
    assert row["question"] == "Lea had 9 kites and sold 2. How many are left?"
    (row,) = convert(tmp_path, "siqa", json.dumps(RECORDS[11][1]))
    assert row["question"] == "Kim fell. How does Kim feel?"
    assert row["choices"] == {"A": "fine", "B": "proud", "C": "hurt"}


def test_mmlu_is_csv_without_a_header(tmp_path):
    (row,) = convert(tmp_path, "mmlu", '"Which, of these, is even?",1,3,5,8,D\n', "csv")
    assert row["choices"] == {"A": "1", "B": "3", "C": "5", "D": "8"}
    assert row["answer"] == "D"


def test_labels_can_come_from_a_separate_file(tmp_path):
    labels = tmp_path / "labels.lst"
    labels.write_text("1\n0\n")
    raw = "".join(json.dumps({"goal": g, "sol1": "do", "sol2": "do not"}) + "\n" for g in "ab")
    rows = convert(tmp_path, "piqa", raw, labels=str(labels))
    assert [row["answer"] for row in rows] == ["B", "A"]
    with pytest.raises(InputError, match="2 labels for 1 records"):
        convert(tmp_path, "piqa", raw, labels=str(labels), limit=1)


def test_hidden_and_repeated_records_are_counted(tmp_path, capsys):
    hidden = {"question": {**STEM["question"], "stem": "Hidden?"}}
    lines = "".join(json.dumps(r) + "\n" for r in (STEM, STEM, hidden))
    assert len(convert(tmp_path, "csqa", lines)) == 1
    assert "3 rows in = 1 used, 1 repeated, 1 without ground truth" in capsys.readouterr().out
    with pytest.raises(InputError, match="no question with ground truth"):
        convert(tmp_path, "csqa", json.dumps(hidden))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("csqa", json.dumps(RECORDS[0][1]), "raw.jsonl:1: does not look like a record of csqa"),
    ("gsm8k", json.dumps(STEM) + "\n" + json.dumps(STEM), "raw.jsonl:1: does not look like"),
    ("gsm8k", "{}\n{", "raw.jsonl:2: not JSON"),
    ("gsm8k", "[1]", "row 1: expected an object"),
    ("gsm8k", "[{}]", "row 1: does not look like"),
])
def test_a_record_in_another_format_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        convert(tmp_path, name, content)


def test_truths_that_no_task_can_hold_are_counted(tmp_path, capsys):
    """Formulas are for math-verify; a text, two answers or a time are no number."""
    pytest.importorskip("math_verify")
    boxed = ["x^2+1", "\\text{Evelyn}", "\\frac{\\sqrt{3}}{2}", "17"]
    lines = [json.dumps({"problem": f"{n}?", "solution": f"So $\\boxed{{{truth}}}$."})
             for n, truth in enumerate(boxed)] + ['{"problem": "5?", "solution": "It is 3."}']
    rows = convert(tmp_path, "math", "\n".join(lines))
    assert [(row["task"], row["answer"]) for row in rows] == [
        ("expression", boxed[0]), ("expression", boxed[2]), ("math", "17")]
    assert "5 rows in = 3 used, 2 without ground truth" in capsys.readouterr().out
    answers = ["9 (apples)", "1/2", "3; 4", "7:30 (a.m.)", "10 (red); 2 (blue)", "yes"]
    lines = [json.dumps({"body": "", "question": f"{n}?", "answer": a}) for n, a in enumerate(answers)]
    assert [row["answer"] for row in convert(tmp_path, "asdiv", "\n".join(lines))] == ["9", "0.5"]


def test_formulas_need_math_verify(tmp_path, monkeypatch):
    from srit.grading.tasks import expression
    expression.parse.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install 'srit\[math\]'"):
        convert(tmp_path, "math", json.dumps({"problem": "a?", "solution": "\\boxed{x}"}))


def test_without_input_a_set_is_fetched_from_the_hub_at_one_commit(tmp_path, monkeypatch):
    table = pyarrow.Table.from_pylist([RECORDS[0][1]])
    file, output = tmp_path / "hub/main/test-00000-of-00001.parquet", str(tmp_path / "q.jsonl")
    file.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(table, file)
    gsm8k = PUBLISHED["gsm8k"]
    with serve(tmp_path / "hub", gsm8k.name, gsm8k.revision) as (address, _):
        use(monkeypatch, address, tmp_path / "cache")
        with pytest.raises(InputError, match=f"{gsm8k.revision}.*its SHA-256 is .*, not ee7b8da9"):
            main(DataConfig(name="gsm8k", output=output, split="test"))
        monkeypatch.setitem(gsm8k.sha256, "test", sha256(file))
        main(DataConfig(name="gsm8k", output=output, split="test"))
    forget()
    assert [(row["id"], row["answer"]) for row in read_questions(output)] == [("gsm8k-test-0", "1200")]
    with pytest.raises(InputError, match="multiarith needs --input"):
        main(DataConfig(name="multiarith", output=output))
    with pytest.raises(InputError, match="no such file"):
        main(DataConfig(name="gsm8k", output=output, input="no.jsonl"))


def test_every_published_set_is_pinned():
    for name, found in PUBLISHED.items():
        assert re.fullmatch("[0-9a-f]{40}", found.revision), name
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in found.sha256.values())
        assert not found.sha256 or len(found.configs) == 1  # a checksum is of one file
        assert all(HUB_SET.fullmatch(source) for source in found.sources("train"))


def ask_gym(tmp_path, **changes):
    output = tmp_path / "gym.jsonl"
    main(DataConfig(name="reasoning_gym", output=str(output), **changes))
    return read_questions(output)


def test_questions_of_reasoning_gym_with_their_truth(tmp_path, monkeypatch):
    def create_dataset(task, size, seed):
        return [{"question": f"{task} {seed} {n}?", "answer": str(n)} for n in range(size)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    rows = ask_gym(tmp_path, tasks=["lcm", "syllogism"], num_rows=5, seed=3)
    assert [(row["question"], row["task"], row["answer"]) for row in rows] == [
        ("lcm 3 0?", "math", "0"), ("syllogism 3 0?", "exact", "0"), ("lcm 3 1?", "math", "1"),
        ("syllogism 3 1?", "exact", "1"), ("lcm 3 2?", "math", "2")]
    assert rows[4]["id"] == "reasoning_gym-3-4"
    with pytest.raises(InputError, match="--tasks sudoku: must be of "):
        ask_gym(tmp_path, tasks=["lcm", "sudoku"])
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"pip install 'srit\[reasoning_gym\]'"):
        ask_gym(tmp_path)


def test_every_task_of_reasoning_gym_has_truths_that_ours_can_hold(tmp_path):
    pytest.importorskip("reasoning_gym")
    rows = ask_gym(tmp_path, num_rows=20 * len(GYM))
    assert len(rows) > 10 * len(GYM)
    for row in rows:
        assert grade(f"The answer is {row['answer']}.", row).correct, row


@pytest.mark.parametrize("name", ["limit", "num_rows"])
def test_a_negative_number_of_rows_is_refused(name):
    """As the end of a slice it would leave out the last ones."""
    with pytest.raises(InputError, match=f"--{name} -1: must be 1 or more"):
        DataConfig("gsm8k", "out.jsonl", **{name: -1})


def test_synthetic_rows_are_demonstrations(tmp_path):
    output = tmp_path / "q.jsonl"
    main(DataConfig(name="synthetic", output=str(output), num_rows=20, domain="out"))
    assert len(read_demos(output)) == 20


@pytest.mark.parametrize("rationales, text", [
    ("plain", "24 * 50 = 1200"), ("marked", "24 * 50 = <<24*50=1200>>1200")])
def test_rationales_are_demonstrations_with_a_right_answer(tmp_path, rationales, text):
    """With the same ids and questions as without."""
    content = json.dumps(RECORDS[0][1])
    (question,) = convert(tmp_path, "gsm8k", content)
    (demo,) = convert(tmp_path, "gsm8k", content, rationales=rationales)
    assert demo == {**question, "teacher": "human", "completion": f"{text}\nThe answer is 1,200."}
    assert grade(demo["completion"], demo).strict_correct
    with pytest.raises(InputError, match="--rationales plain: svamp has none"):
        convert(tmp_path, "svamp", json.dumps(RECORDS[1][1]), rationales="plain")
    with pytest.raises(InputError, match="row 1: does not look like a record of gsm8k"):
        convert(tmp_path, "gsm8k", '[{"question": "How many?"}]', rationales=rationales)
