"""`srit COMMAND`: every command starts and shows its help."""

import pytest

from srit.commands.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["srit", command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert f"usage: srit {command}" in capsys.readouterr().out


def test_an_unknown_command_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.argv", ["srit", "trian"])
    with pytest.raises(SystemExit, match="2"):
        main()
