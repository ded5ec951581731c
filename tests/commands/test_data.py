"""Published formats, in records written for this test."""

import json

import pytest

from srit.commands.data import DataConfig, main
from srit.data.questions import read_demos, read_questions
from srit.grading.answers import grade
from srit.runtime.files import InputError

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
]


def convert(tmp_path, name, content, suffix="jsonl", **changes):
    file = tmp_path / f"raw.{suffix}"
    file.write_text(content)
    output = tmp_path / "questions.jsonl"
    main(DataConfig(name=name, input=str(file), output=str(output), **changes))
    return read_questions(output)


@pytest.mark.parametrize(("name", "record", "answer"), RECORDS, ids=[r[0] for r in RECORDS])
def test_every_format_is_converted(tmp_path, name, record, answer):
    (row,) = convert(tmp_path, name, json.dumps(record) + "\n")
    assert (row["id"], row["answer"]) == (f"{name}-raw-0", answer)
    assert "  " not in row["question"] and row["question"] == row["question"].strip()
    assert row["task"] == ("choice" if answer.isalpha() else "math")
    assert convert(tmp_path, name, json.dumps([record]), "json") == [row]


def test_texts_are_joined_as_published(tmp_path):
    (row,) = convert(tmp_path, "svamp", json.dumps(RECORDS[1][1]))
    assert row["question"] == "Lea had 9 kites and sold 2. How many are left?"
    (row,) = convert(tmp_path, "siqa", json.dumps(RECORDS[-1][1]))
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
    ("csqa", json.dumps(RECORDS[0][1]), "record 1: does not look like a record of csqa"),
    ("gsm8k", json.dumps(STEM) + "\n" + json.dumps(STEM), "raw.jsonl:1: does not look like"),
    ("gsm8k", "{}\n{", "raw.jsonl:2: not JSON"),
    ("gsm8k", "[1]", "record 1: does not look like"),
])
def test_a_record_in_another_format_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        convert(tmp_path, name, content)


def test_input_is_required_and_hub_files_are_downloaded(tmp_path, monkeypatch):
    output = str(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="needs --input"):
        main(DataConfig(name="gsm8k", output=output))
    with pytest.raises(InputError, match="no such file"):
        main(DataConfig(name="gsm8k", output=output, input=str(tmp_path / "no.jsonl")))
    with pytest.raises(InputError, match="hub:OWNER/NAME:FILE"):
        main(DataConfig(name="gsm8k", output=output, input="hub:a/b"))
    raw = tmp_path / "test.jsonl"
    raw.write_text(json.dumps(RECORDS[0][1]))
    asked = []

    def download(*args, **keywords):
        asked.append((args, keywords))
        return str(raw)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    main(DataConfig(name="gsm8k", output=output, input="hub:own/set:a/test.jsonl"))
    assert asked == [(("own/set", "a/test.jsonl"), {"repo_type": "dataset"})]
    assert read_questions(output)[0]["id"] == "gsm8k-test-0"


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
    with pytest.raises(InputError, match="record 1: does not look like a record of gsm8k"):
        convert(tmp_path, "gsm8k", '[{"question": "How many?"}]', rationales=rationales)
