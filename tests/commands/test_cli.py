"""`srit COMMAND`: every command starts and shows its help, at once."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

import srit
from srit import config
from srit.commands.cli import COMMANDS, main
from srit.help import GROUPS, MOST_USED, print_help
from srit.runtime.outcome import FAILED


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["srit", command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert f"usage: srit {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_flag_once_the_most_used_ones_first(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["srit", command, "--help"])
    monkeypatch.setenv("COLUMNS", "100")  # one column
    with pytest.raises(SystemExit):
        main()
    panel = re.compile(r"^\W*(?:\w+ )?options +(?:─|$)", re.M)
    first, *groups = panel.split(capsys.readouterr().out)[1:]
    flags, more = (re.findall(r"^\W* --(\w+)", text, re.M) for text in (first, "".join(groups)))
    known = [field.name for field in dataclasses.fields(COMMANDS[command][1])]
    assert sorted({"config", *known}) == sorted(flags + more)
    assert "(required)" not in "".join(groups) and "Seed of the completions" not in "".join(groups)
    if groups:
        assert flags[0] == "config" and len(flags) <= 11 and len(groups) >= 3


def test_help_has_the_text_of_every_flag(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        print_help(config.DPOConfig, "srit dpo")
    out = capsys.readouterr().out
    for group in ("model", "data", "prompts", "optimization", "LoRA", "checkpoints", "logging"):
        assert f"{group} options" in out
    assert "default: )" not in out and "Rows for the evaluation loss, likewise. (default: none)" in (
        " ".join(out.replace("│", "").split()))
    assert "other options" not in out and "How strongly the policy is held" in out
    for cls in (config.SFTConfig, config.DPOConfig, config.SampleConfig, config.EvalConfig):
        named = {name for names in (MOST_USED, *GROUPS.values()) for name in names}
        assert {field.name for field in dataclasses.fields(cls)} <= named


def test_a_reader_of_help_may_have_left():
    """As `srit dpo --help | head -1` has."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "srit.commands.cli", "dpo", "--help"], stdout=writer,
                          stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (FAILED, b"")


def test_help_and_errors_in_flags_do_not_wait_for_torch():
    code = f"""if True:
        import sys
        from srit.commands.cli import main
        for words in (["--help"], ["--version"], *([name, "--help"] for name in {list(COMMANDS)}),
                      ["dpo", "--betta", "1"], ["sft", "--config", "no.yaml"]):
            sys.argv = ["srit", *words]
            try:
                main()
            except SystemExit:
                pass
            assert "torch" not in sys.modules, words
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "error: command line: unknown key 'betta'; did you mean 'beta'?",
        "error: no.yaml: no such file"]


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["srit", "--version"])
    main()
    assert capsys.readouterr().out == f"srit {srit.__version__}\n"


def test_an_unknown_command_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.argv", ["srit", "trian"])
    with pytest.raises(SystemExit, match="2"):
        main()
