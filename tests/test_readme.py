"""The README's example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    rate, loss = capsys.readouterr().out.split()
    assert 0 < float(rate) <= 1
    assert float(loss) < 0.5
