"""Which stages of a run directory count, and what a report says of the others."""

import json
import shutil

import pytest
from fake_run import NAMES, edit_run, fake_run

from srit.commands.progress import read_progress
from srit.commands.report import write_report
from srit.commands.run import accuracy_table
from srit.runtime.files import InputError

BEHIND_SFT = NAMES[2:]


def shown(root):
    """The page, after a look at the accuracy table: (headings, minutes by stage, text)."""
    page = write_report([root]).read_text()
    markdown = (root / "report.md").read_text()
    (heads,) = [line for line in markdown.splitlines() if line.startswith("| data set")]
    minutes = dict(line.strip("| ").split(" | ") for line in markdown.split("## Run")[1].splitlines()
                   if line.startswith("| ") and "minutes" not in line)
    for note in read_progress(root).notes:
        assert note in page and note in markdown and note in accuracy_table(root)
    return [head.strip() for head in heads.strip("|").split("|")][2:-1], minutes, page


def test_everything_counts_in_a_run_that_is_as_it_was_made(tmp_path):
    root = fake_run(tmp_path / "fake")
    heads, minutes, _ = shown(root)
    assert heads == ["Baseline", "Instructed", "Self-refined"]
    assert minutes == dict.fromkeys(NAMES, "1.5") and not read_progress(root).notes


def test_stages_made_from_a_changed_file_are_left_out(tmp_path):
    root = fake_run(tmp_path / "fake")
    (root / "demos.jsonl").write_text("corrected")
    heads, minutes, page = shown(root)
    assert heads == ["Baseline"]
    assert minutes == {"eval-base": "1.5", **dict.fromkeys(NAMES[1:], "left out")}
    left_out = read_progress(root).left_out
    assert left_out["sft"] == f"{root}/demos.jsonl has changed"
    assert left_out["eval-sft"] == "it was made from sft, which is left out"
    assert "<svg" not in page and "too long" not in page and "improved" not in page


def test_a_run_that_stopped_when_it_was_made_anew_shows_no_old_numbers(tmp_path):
    """What lies there of the stages behind is older, though its own inputs may not have changed."""
    root = fake_run(tmp_path / "fake")
    edit_run(root / "sft", finished=False, outputs={})
    heads, minutes, page = shown(root)
    assert heads == ["Baseline"] and minutes["sft"] == "unfinished" and minutes["dpo"] == "left out"
    assert page.count("<svg") == 1  # its loss so far
    shutil.rmtree(root / "sft")
    left_out = read_progress(root).left_out
    assert tuple(left_out) == BEHIND_SFT
    assert left_out["eval-sft"] == "it was made from sft, which has not run"


def test_only_the_rounds_of_the_recipe_are_shown(tmp_path):
    root = fake_run(tmp_path / "fake", names=(*NAMES, "sample-2", "pair-2", "dpo-2", "eval-dpo-2"),
                    rounds=2)
    assert shown(root)[0] == ["Baseline", "Instructed", "Self-refined", "Self-refined, round 2"]
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rounds: 2", "rounds: 1"))
    heads, minutes, page = shown(root)
    assert heads == ["Baseline", "Instructed", "Self-refined"] and list(minutes) == list(NAMES)
    assert "round 2" not in page and "eval-dpo-2" not in page


def test_edited_results_and_other_settings_are_left_out(tmp_path):
    root = fake_run(tmp_path / "fake")
    results = root / "eval-sft" / "results.json"
    results.write_text(results.read_text().replace("0.", "0.9"))
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "dpo: {max_steps: 20}\n")  # longer than it has been trained
    heads, minutes, _ = shown(root)
    assert heads == ["Baseline"] and minutes["sft"] == "1.5"
    assert read_progress(root).left_out == {
        "eval-sft": f"{results} is not as it was written", "dpo": "max_steps was -1, now 20",
        "eval-dpo": "it was made from dpo, which is left out"}


def test_a_run_whose_inputs_are_gone_is_shown_but_marked(tmp_path):
    """As after copying it from another machine, without its weights."""
    fake_run(tmp_path / "there")
    root = (tmp_path / "there").rename(tmp_path / "here")
    for name in ("sft", "dpo"):
        (root / name / "model.safetensors").unlink()
    heads, minutes, page = shown(root)
    assert heads == [f"{name} (unchecked)" for name in ("Baseline", "Instructed", "Self-refined")]
    assert minutes == dict.fromkeys(NAMES, "1.5") and page.count("<svg") == 5
    assert f"sft is unchecked: {tmp_path}/there/demos.jsonl is gone." in page
    results = root / "eval-sft" / "results.json"
    results.write_text(results.read_text() + " ")
    assert "Instructed (unchecked)" not in shown(root)[0]


def test_the_combined_table_names_what_is_unchecked_in_any_run(tmp_path):
    roots = [fake_run(tmp_path / str(seed), seed) for seed in range(2)]
    (roots[1] / "other.jsonl").unlink()
    page = write_report(roots).read_text()
    assert f"{roots[1]}: eval-sft is unchecked: {roots[1]}/other.jsonl is gone." in page
    assert page.count("<th class=\"n\">Instructed (unchecked)</th>") == 1


@pytest.mark.parametrize("stage, changes, fault", [
    ("sft", {"machine": None}, "field 'machine' must be str"),
    ("sft", {"inputs": []}, "field 'inputs' must be dict"),
    ("sft", {"finished": "yes"}, "field 'finished' must be bool"),
    ("dpo", {"seconds": "long"}, "field 'seconds' must be int | float"),
    ("dpo", {"finished": False, "outputs": [1]}, "field 'outputs' must be dict"),
    ("pair", {"counts": {"rows": [1]}}, "counts: field 'rows' must be dict"),
    ("pair", {"counts": {"rows": {"in": 1}}}, "counts: rows: .*no field 'used'"),
    ("pair", {"counts": {"rows": {"in": 1, "used": 0, "dropped": {"why": "x"}}}}, "'why' must be int"),
    ("eval-sft", {"outputs": {}}, "outputs: .*no field 'results.json'"),
    ("eval-sft", {"stage": "sft"}, "stage is 'sft', the recipe has 'eval' there"),
])
def test_a_run_json_that_srit_did_not_write_is_named_with_its_field(tmp_path, stage, changes, fault):
    root = fake_run(tmp_path / "fake")
    edit_run(root / stage, **changes)
    with pytest.raises(InputError, match=f"{root}/{stage}/run.json: .*{fault}".replace("|", "[|]")):
        write_report([root])


def test_a_run_json_without_a_field_is_named(tmp_path):
    root = fake_run(tmp_path / "fake")
    file = root / "sft" / "run.json"
    run = json.loads(file.read_text())
    del run["machine"]
    file.write_text(json.dumps(run))
    with pytest.raises(InputError, match=f"{file}: .*no field 'machine'"):
        write_report([root])


@pytest.mark.parametrize("old, new, fault", [
    ("rounds: 1", "rounds: [1", ":[0-9]+: not YAML"),
    ("sft: {", "sfft: {", ": unknown key 'sfft'"),
    ("output_dir: ", "output_dir: 5 #", ": output_dir must be a string"),
    ("demos: ", "demos: 5, questions: ", ": data: demos must be a string or a list of strings"),
    ("2e-4", "fast", ": sft: no value for that setting"),
    ("2e-4", "-1", ": sft: --learning_rate -1.0: must be 0 or more"),
])
def test_a_broken_recipe_is_named_with_its_key(tmp_path, old, new, fault):
    root = fake_run(tmp_path / "fake", names=NAMES[:2])
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(InputError, match=f"{recipe}{fault}"):
        write_report([root])
