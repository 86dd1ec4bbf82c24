"""``make bench`` runs its parts apart from the committed results, and times them."""

import sys
from pathlib import Path

import pytest

from benchmarks import bench


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The scripts and arguments that it runs, nothing being run."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments, fails=()):
        commands = []

        def run(command, check):
            assert not check
            commands.append(command[1:])
            failed = Path(command[1]).stem in fails
            return bench.subprocess.CompletedProcess(command, int(failed))

        monkeypatch.setattr(bench.subprocess, "run", run)
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
        bench.main()
        return commands

    return main


def test_every_part_writes_beside_the_committed_results(started, capsys):
    old = bench.OUT / "lsq.json"
    old.parent.mkdir(parents=True)
    old.touch()
    commands = started()
    assert not old.exists()  # it would be gone on with
    assert [Path(script).stem for script, *_ in commands] == list(bench.commands(None))
    assert all(Path(script).is_file() for script, *_ in commands)
    assert all(Path(command[-1]).parent == bench.OUT for command in commands)
    assert not any("--data" in command for command in commands)
    out = capsys.readouterr().out
    assert out.count("Fashion-MNIST") == 1
    assert "| all |" in out


def test_data_reach_the_parts_that_have_them(started, capsys):
    Path("data.npz").touch()
    commands = started("--data", "data.npz")
    given = {Path(c[0]).stem: c for c in commands if "--data" in c}
    assert list(given) == ["correlation"]
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        started("--data", "nowhere.npz")
    assert "there is no file nowhere.npz" in capsys.readouterr().err


def test_a_part_that_fails_does_not_stop_the_others(started, capsys):
    with pytest.raises(SystemExit, match="failed"):
        started("--parts", "lsq", "protocol", fails=("lsq",))
    out = capsys.readouterr().out
    assert "| 0.0 | FAILED |" in out
    assert "| protocol | 0.0 | made |" in out
