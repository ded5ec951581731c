"""The README's code runs, its files exist, and so does what any page links to."""

import re
import runpy
import shlex
import sys
from pathlib import Path

from tiny import demo, question, tiny_checkpoint, write_rows

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "0.6931" in capsys.readouterr().out


def test_links_and_files_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[)#]", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)
    for target in re.findall(r"\b(?:train|benchmarks|runs)/\w+\.(?:py|yaml)\b", TEXT):
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", TEXT, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)


def test_the_stage_commands_run_one_after_the_other(tmp_path, monkeypatch):
    """As written, on a tiny checkpoint; the samples are long enough that some of them end."""
    tiny_checkpoint(tmp_path / "M")
    rows = [(i, i % 5 + 1, i % 3 + 1) for i in range(6)]
    write_rows(tmp_path / "demos.jsonl", [demo(*r) for r in rows])
    for name in ("questions", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [question(*r) for r in rows])
    commands = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
                for line in block.splitlines() if line.startswith("python train/")]
    assert [Path(c.split()[1]).stem for c in commands] == ["sft", "sample", "pair", "dpo", "eval"]
    on_cpu = ["--device", "cpu", "--dtype", "float32"]
    added = {"sft": [*on_cpu, "--max_steps", "2"], "dpo": [*on_cpu, "--max_steps", "2"],
             "sample": [*on_cpu, "--max_new_tokens", "200", "--temperature", "1.0"],
             "eval": [*on_cpu, "--max_new_tokens", "8"], "pair": []}
    monkeypatch.chdir(tmp_path)
    for command in commands:
        _, script, *flags = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *flags, *added[Path(script).stem]])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert (tmp_path / "out/eval/results.json").is_file()


def test_the_reading_list_tells_lengths():
    """Within a tenth, so that not every edit has to come back here."""
    found = re.findall(r"\| \d \| \[([\w/.]+)\]\(\1\) \| (\d+) \|", TEXT)
    assert len(found) == 8
    for file, lines in found:
        real = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - real) <= 0.1 * real, f"{file} has {real} lines, not {lines}"
