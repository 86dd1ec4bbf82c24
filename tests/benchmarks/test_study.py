"""The skeleton of the scripts: results that are added to, options, what is shown."""

import json

import pytest

from benchmarks.lib import study


def test_what_is_written_is_read_and_lies_on_lines(tmp_path):
    made = {
        "settings": {"seeds": [0, 1], "name": 'a "b" {c}', "none": None},
        "rows": {"A": {"x": [[1.5, 2]], "tuning": {0.1: 3}}, "B": {}},
        "sets": [{"a": 1}, {"b": [2]}],
    }
    study.write(made, tmp_path / "new/out.json")
    text = (tmp_path / "new/out.json").read_text()
    assert study.read(tmp_path / "new/out.json") == json.loads(json.dumps(made))
    assert '\n{"a": 1},\n{"b": [2]}\n]' in text
    assert json.dumps(made["settings"]) in text


def test_results_of_other_settings_are_not_added_to(tmp_path):
    out = tmp_path / "out.json"
    assert study.begun({"seeds": 1}, out) == {"settings": {"seeds": 1}, "rows": {}}
    study.write({"settings": {"seeds": 1}, "rows": {"A": 2}}, out)
    assert study.begun({"seeds": 1}, out)["rows"] == {"A": 2}
    with pytest.raises(SystemExit, match="other settings or versions"):
        study.begun({"seeds": 2}, out)
    assert study.read(tmp_path / "nowhere.json", []) == []


def test_a_report_is_of_the_committed_results_where_no_file_is_named(capsys, tmp_path):
    parser = study.parser("A study.\n\nMore.", "lsq.json", quick="faster", figure=True)
    asked = parser.parse_args(["--report", "--quick", "--figure", "a.png"])
    assert asked.report == study.RESULTS / "lsq.json"
    assert (asked.quick, str(asked.out)) == (True, "out/lsq.json")
    drawn = []
    study.show(asked, lambda results: {"a": "| 1 |"}, lambda *x: drawn.append(x))
    assert capsys.readouterr().out == "a\n\n| 1 |\n\n"
    assert [path.name for _, path in drawn] == ["a.png"]
    asked = parser.parse_args(["--out", str(tmp_path / "o.json")])
    study.write({"rows": {"A": 1}}, asked.out)
    study.show(asked, lambda results: str(results))
    assert capsys.readouterr().out == "{'rows': {'A': 1}}\n"
