"""`srit COMMAND`: every command starts and shows its help, at once."""

import subprocess
import sys

import pytest

import srit
from srit.commands.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["srit", command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert f"usage: srit {command}" in capsys.readouterr().out


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
