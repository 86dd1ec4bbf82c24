"""``make bench`` runs its parts apart from the committed results, and times them."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def bench(benchmark, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return benchmark("bench")


def started(bench, monkeypatch, *arguments, fails=()):
    """The scripts and arguments that it runs, nothing being run."""
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


def test_every_part_writes_beside_the_committed_results(bench, monkeypatch, capsys):
    old = bench.OUT / "lsq.json"
    old.parent.mkdir(parents=True)
    old.touch()
    commands = started(bench, monkeypatch)
    assert not old.exists()  # it would be gone on with
    assert [Path(script).stem for script, *_ in commands] == list(bench.commands(None))
    assert all(Path(script).is_file() for script, *_ in commands)
    assert all(Path(command[-1]).parent == bench.OUT for command in commands)
    assert not any("--data" in command for command in commands)
    out = capsys.readouterr().out
    assert out.count("Fashion-MNIST") == 1
    assert "| all |" in out


def test_data_reach_the_parts_that_have_them(bench, monkeypatch, tmp_path, capsys):
    data = tmp_path / "data.npz"
    data.touch()
    commands = started(bench, monkeypatch, "--data", data)
    given = [Path(c[0]).stem for c in commands if "--data" in c]
    assert given == ["quality", "correlation"]
    assert "left out" not in capsys.readouterr().out


def test_a_part_that_fails_does_not_stop_the_others(bench, monkeypatch, capsys):
    chosen = "--parts", "lsq", "label_noise"
    with pytest.raises(SystemExit, match="failed"):
        started(bench, monkeypatch, *chosen, fails=("lsq",))
    out = capsys.readouterr().out
    assert "| 0.0 | FAILED |" in out
    assert "| label_noise | 0.0 | made |" in out


def test_a_missing_file_is_named(bench, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        started(bench, monkeypatch, "--data", "nowhere.npz")
    assert "there is no file nowhere.npz" in capsys.readouterr().err
