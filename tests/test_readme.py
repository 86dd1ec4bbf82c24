"""The example of the README runs as printed."""

import harness


def test_the_example_runs(capsys):
    (code,) = harness.code("../README.md")
    exec(compile(code, "README.md", "exec"), {})
    rate, loss = capsys.readouterr().out.split()
    assert 0 < float(rate) <= 1
    assert float(loss) < 0.5
