"""The protocol: its search, its training runs, what it resumes, and what it reports."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from benchmarks.lib import networks, study
from benchmarks.quality import protocol, report, rows, tasks
from benchmarks.quality.training import OutOfTime, Training

slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)


def task(**changes):
    small = {"images": 60, "epochs": 2, "batch_size": 20, "seeds": (0, 1)}
    small |= {"budget": 2, "search_seeds": (100,), "held_out": 40}
    return dataclasses.replace(tasks.TASKS["digits"], **(small | changes))


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """100 images of 8 x 8 with colours, in ten classes that can be told apart."""
    x = np.random.default_rng(0).integers(0, 120, (130, 8, 8, 3), np.uint8)
    y = np.arange(130, dtype=np.uint8) % 10
    x[np.arange(130), y // 2, y % 2] += 130
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    named = {"train_x": x[:100], "train_y": y[:100]}
    np.savez(path, **named, test_x=x[100:], test_y=y[100:])
    return path


@pytest.fixture
def mini(coloured):
    def make(**changes):
        given = {"images": 60, "held_out": 40, "batch_size": 20} | changes
        mini = dataclasses.replace(tasks.TASKS["cifar10_mini"], **given)
        return tasks.Source(mini, coloured)

    return make


# The search.


def test_values_move_along_one_two_five():
    walk = [0.05]
    for step in (1, 1, -1, -1, -1, -1):
        walk.append(protocol.neighbour(walk[-1], step))
    assert walk == [0.05, 0.1, 0.2, 0.1, 0.05, 0.02, 0.01]
    assert protocol.neighbour(5e-4, 1) == 1e-3


def test_the_search_finds_the_top_of_a_hill_within_its_budget():
    tried = []

    def score(values):
        tried.append(values)
        top = {"rho": 1.0, "rate": 0.01}
        return -sum(abs(math.log(values[name] / top[name])) for name in top)

    best = protocol.search({"rho": 0.1, "rate": 0.05}, score, 20)
    assert best == {"rho": 1.0, "rate": 0.01}
    keys = [tuple(x.values()) for x in tried]
    assert len(keys) == len(set(keys)) < 20
    tried.clear()
    assert protocol.search({"rho": 0.1, "rate": 0.05}, score, 3)["rho"] == 0.5
    assert len(tried) == 3
    assert protocol.search({"rho": 0.1}, score, 0) == {"rho": 0.1}
    assert len(tried) == 3


# Images.


def test_no_image_judges_the_search_and_is_trained_on(mini):
    source = mini()
    names = lambda images: {np.asarray(image).tobytes() for image in images}
    searched, tested = source.split(100, tested=False), source.split(0, tested=True)
    assert len(names(searched.x)) == len(names(tested.x)) == 60
    assert not names(searched.judge_x) & (names(searched.x) | names(tested.x))
    assert np.bincount(searched.judge_y).tolist() == [4] * 10
    np.testing.assert_array_equal(tested.judge_x, source.data.test_x)
    digits = tasks.Source(tasks.TASKS["digits"], None)
    searched, tested = digits.split(100, tested=False), digits.split(0, tested=True)
    assert [len(x) for x in (*searched, *tested)] == [1150] * 2 + [287] * 2 + [
        1437,
        1437,
        360,
        360,
    ]
    right = {
        np.asarray(x).tobytes(): y
        for x, y in zip(digits.data.train_x, digits.data.train_y, strict=True)
    }
    wrong = [
        right[np.asarray(x).tobytes()] != y
        for x, y in zip(tested.x, tested.y, strict=True)
    ]
    assert 0.33 < np.mean(wrong) < 0.39  # one in ten is drawn as it was
    again = digits.split(100, tested=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, searched, again))
    # A run that takes all images, which the search therefore cannot.
    whole = mini(images=100, held_out=20)
    searched, tested = whole.split(100, tested=False), whole.split(0, tested=True)
    assert [len(x) for x in (*searched, *tested)] == [80] * 2 + [20] * 2 + [
        *(100, 100, 30, 30)
    ]
    assert not names(searched.judge_x) & names(searched.x)


def test_a_mixer_takes_square_patches():
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    model = networks.NETWORKS["mixer"](blocks=0)  # the mean over all patches
    params = model.init(jax.random.key(0), image, False)
    logits = lambda x: np.asarray(model.apply(params, x, False))
    turned = np.roll(image, 8, axis=(1, 2))  # the same patches, at other places
    np.testing.assert_allclose(logits(turned), logits(image), rtol=1e-4, atol=1e-5)
    assert np.abs(logits(np.roll(image, 4, axis=1)) - logits(image)).max() > 1e-2
    assert np.abs(logits(np.roll(image, 4, axis=2)) - logits(image)).max() > 1e-2


# Trainings.

# Of each kind of step one, with a gradient of a part, examples that are chosen, and
# without ascents.
TRAINED = "LookSAM-5", "quarter-batch SAM", "SAF"
SPECIAL = {"SGD 2x": 2.0, "MESA": 4 / 3, "ESAM": 2 + 1 / 3 - 0.5 - 1 / 20}
SPECIAL |= {"R-SAM": 7 / 3, "quarter-batch SAM": 1.25, "SAM-5": 8 / 6, "SAM-10": 7 / 6}
SPECIAL |= {"LookSAM-5": 8 / 6, "SAM-3": 8 / 6, "SAM-3, reuse": 8 / 6}
SPECIAL |= {"SAM, last quarter": 8 / 6}  # from the fifth step of six


@pytest.mark.parametrize(
    "name", [name if name in TRAINED else slow(name) for name in rows.ROWS]
)
def test_every_row_trains_and_its_gradients_are_counted(name):
    training = Training(tasks.Source(task(), None), name)
    values = rows.start(training.row, {})
    result = training.run(values, 0, tested=True)
    assert result.sgd_cpu_seconds > 0
    assert result.loss is not None
    assert 0 < result.accuracy < 100
    steps = 6
    if name in ("AE-SAM", "RSAM"):
        assert steps <= result.gradients <= 2 * steps
    else:
        each = SPECIAL.get(name, 1 + training.row.ascends)
        assert result.gradients / steps == pytest.approx(each, abs=1e-2)
    assert training.run(values, 1, tested=True).loss != result.loss
    assert training.run(values, 0, tested=True).loss == result.loss


@pytest.mark.parametrize("name", ["SAM-5", "MSAM", "MESA", "AE-SAM"])
@pytest.mark.slow
def test_a_scan_computes_what_the_loop_does(mini, name):
    values = rows.start(rows.ROWS[name], {})
    found = []
    for looped in (True, False):
        training = Training(mini(), name)
        assert not training.looped  # a CPU's convolutions
        training.looped = looped
        found.append(training.run(values, 0, tested=True))
    if name == "AE-SAM":  # decides a step later where it is not in a scan
        assert found[0].gradients != found[1].gradients
    else:
        assert found[0].gradients == found[1].gradients
        assert found[0].loss == pytest.approx(found[1].loss, rel=1e-4)
        assert found[0].accuracy == found[1].accuracy


def test_a_search_and_its_tests_share_a_program():
    training = Training(tasks.Source(task(), None), "SAM")
    values = rows.start(training.row, {})
    for tested in (False, True):
        training.run(values, 0, tested=tested)
    assert training.looped
    assert training.advance._cache_size() == training.sgd.advance._cache_size() == 1


def test_msam_is_judged_without_its_perturbation():
    training = Training(tasks.Source(task(images=1437, epochs=20), None), "MSAM")
    values = {"rho": 3.0, "rate": 0.05, "decay": 5e-4}
    judged = training.run(values, 0, tested=True).accuracy
    training.row = training.row._replace(base="msam, but judged where it trains")
    training.optimizer = Training(training.source, "MSAM").optimizer
    assert training.run(values, 0, tested=True).accuracy < judged - 5


@pytest.mark.slow
def test_sgd_learns_colours(mini):
    still = {"network": "mlp", "augmentation": "none", "epochs": 40}
    training = Training(mini(images=90, held_out=10, **still), "SGD")
    result = training.run({"rate": 0.1, "decay": 1e-4}, 0, tested=True)
    assert result.accuracy > 90


# The file, and what resumes.


def lines(path):
    timed = "seconds", "cpu_seconds", "sgd_cpu_seconds"
    kept = lambda line: {k: v for k, v in line.items() if k not in timed}
    return [kept(line) for line in protocol.read(path)]


def finish(path, name, given, late=lambda: False):
    made = protocol.Protocol(
        "digits", tasks.Source(given, None), protocol.Results(path), late
    )
    try:
        return made.complete([name])
    except OutOfTime:
        return None


def test_a_cut_protocol_goes_on_where_it_was(tmp_path):
    given = task(epochs=3)
    assert len(finish(tmp_path / "once.jsonl", "LookSAM-5", given)) == 2
    path, calls = tmp_path / "cut.jsonl", 0

    def late():  # after the first epoch that a process has trained
        nonlocal asked
        asked += 1
        return asked > 1

    while True:
        asked = 0
        if finish(path, "LookSAM-5", given, late):
            break
        calls += 1
        with path.open("a") as file:
            file.write('{"task": "cut of')  # as a killed process leaves it
        assert calls < 20
    assert calls > 4
    assert lines(path) == lines(tmp_path / "once.jsonl")
    assert not list(path.with_suffix(".partial").glob("*"))
    before = path.read_text()
    assert finish(path, "LookSAM-5", given)  # all is there
    assert path.read_text() == before
    with pytest.raises(SystemExit, match="other settings"):
        finish(path, "LookSAM-5", task(epochs=4))


def test_early_stopping_takes_an_epoch_of_the_search_of_sgd(tmp_path):
    path, given = tmp_path / "new/early.jsonl", task(epochs=4)
    tested = finish(path, "SGD, early", given)
    searched = [line for line in lines(path) if line.get("tested") is False]
    assert {line["row"] for line in searched} == {"SGD"}
    best = max(max(line["curve"]) for line in searched)
    (of,) = {json.dumps(line["values"]) for line in tested}
    curve = next(x["curve"] for x in searched if json.dumps(x["values"]) == of)
    assert curve[tested[0]["stop"] - 1] == best
    assert all("curve" not in line for line in tested)


def test_a_file_is_repeated_at_the_settings_that_its_search_chose(tmp_path):
    given = task(epochs=2)
    for row in ("SGD", "SGD, early", "SAM"):
        finish(tmp_path / "first.jsonl", row, given)
    first = protocol.read(tmp_path / "first.jsonl")
    again = protocol.Results(tmp_path / "again.jsonl")
    made = protocol.Protocol("digits", tasks.Source(given, None), again)
    assert made.repeat(first, ["SGD, early", "SAM"]) == [0.0] * 4
    _, *found = lines(again.path)
    wanted = [
        x for x in lines(tmp_path / "first.jsonl") if x.get("row") not in (None, "SGD")
    ]
    by_run = lambda of: sorted(of, key=json.dumps)
    assert by_run(found) == by_run(wanted)
    assert made.repeat(first, ["SAM"]) == [0.0] * 2
    assert len(lines(again.path)) == 1 + len(found)


def test_a_repetition_takes_as_many_seeds_as_it_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tasks.TASKS, "digits", task(epochs=1))
    finish(tmp_path / "first.jsonl", "SGD", task(epochs=1))
    command = ["protocol.py", "--repeat", str(tmp_path / "first.jsonl"), "--seeds", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "again.jsonl")])
    protocol.main()
    assert "digits: 1 runs differ by 0.00 at most" in capsys.readouterr().out
    command += "--rows", "SAM", "--out", str(tmp_path / "none.jsonl")
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"first.jsonl has no such runs of digits"):
        protocol.main()


@pytest.mark.slow
def test_without_a_search_seeds_take_turns(tmp_path, mini):
    """So that time that runs out costs seeds, not rows."""
    source = mini(budget=0, epochs=1, starts=(("rate", 0.2), ("rho", 0.05)))
    results = protocol.Results(tmp_path / "gpu.jsonl")
    made = protocol.Protocol("cifar10_mini", source, results)
    tested = made.complete(["SGD", "MSAM"])
    order = [(line["row"], line["seed"]) for line in tested]
    assert order == [("SGD", 0), ("MSAM", 0), ("SGD", 1), ("MSAM", 1)]
    assert tested[0]["values"] == {"rate": 0.2, "decay": 5e-4}
    # A radius of SAM's scale is none for MSAM's momentum.
    assert tested[1]["values"] == {"rho": 0.5, "rate": 0.2, "decay": 5e-4}


# What is reported.


def line(row, seed, accuracy, gradients=100.0, **more):
    values = {"rho": 0.1, "rate": 0.05, "decay": 5e-4}
    known = {"task": "digits", "row": row, "values": values, "seed": seed}
    counted = {"accuracy": accuracy, "gradients": gradients, "cpu_seconds": 2.0}
    counted["sgd_cpu_seconds"] = 2.0
    return known | {"tested": True} | counted | more


MADE = [
    {"task": "digits", "settings": {"title": "Digits"}},
    *(line("SGD", seed, 90.0 + seed) for seed in range(3)),
    *(line("SAM", s, 92.0 + 2 * s, 200.0, cpu_seconds=4.0) for s in range(3)),
    # Two searched settings, one of them with two seeds.
    *(line("SAM", s, 90.0, tested=False) for s in (100, 101)),
    line("SAM", 100, 80.0, tested=False, values={"rho": 0.2, "rate": 0.05}),
    {"task": "fashion_mlp", "settings": {"title": "not tested yet"}},
]


def test_differences_are_paired_and_have_intervals(tmp_path):
    found = report.markdown(MADE)
    assert list(found) == ["headline", "vsam", "luck", "digits"]
    cells = [x.strip() for x in found["digits"].splitlines()[-1].strip("|").split("|")]
    # 2, 3 and 4 points: 3 +- 4.303 / sqrt(3)
    assert cells == [
        *("SAM", "rho 0.1, lr 0.05, wd 0.0005", "2", "2.00", "2.00", "94.00"),
        *("+3.00 ± 2.48", "", ""),
    ]
    assert "not yet run" in found["headline"]
    twice = [*MADE, line("MSAM", 0, 91.0, cpu_seconds=3.0, sgd_cpu_seconds=1.0)]
    twice.append(line("MSAM", 1, 91.0, cpu_seconds=5.0, sgd_cpu_seconds=1.0))
    assert " 1.00 | 4.00 | 91.00 " in report.markdown(twice)["digits"]
    report.draw(MADE, tmp_path / "new/figure.png")
    assert (tmp_path / "new/figure.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_another_machine_are_compared():
    again = [dict(x) for x in MADE if x["task"] == "digits"]
    for x in again:
        if x.get("row") == "SAM" and x["tested"]:
            x["accuracy"] += {0: 0.0, 1: 3.0, 2: -1.5}[x["seed"]]
    again.append(line("SAM", 1, 0.0, values={"rho": 1.0}))  # no such run to compare
    again = [x for x in again if x.get("tested") is not False]
    cells = report.repeated(MADE, again).splitlines()[-1]
    # The root of (9 + 2.25) / 6; 1.5 / 3; there is no SGD 2x.
    assert cells == "| Digits | 6 | 4 | 1.37 | 0.50 |  |"


def test_another_search_is_reported_beside_the_first(tmp_path):
    again = [x | {"task": "digits, search 2"} for x in MADE if x["task"] == "digits"]
    for x in again:
        if x.get("row") == "SAM" and x["tested"]:
            x["accuracy"] -= 1
    found = report.markdown([*MADE, *again])
    assert found["luck"].splitlines()[2:] == [
        "| Digits | SAM minus SGD | +3.00 ± 2.48 | +2.00 ± 2.48 |"
    ]
    assert "search" not in found["headline"]
    # A task without this search, or a file without the first one.
    third = [x | {"task": "digits, search 3"} for x in again]
    assert report.markdown([*MADE, *third])["luck"].splitlines()[0] == (
        "| task | difference | search 1 | search 3 |"
    )
    assert report.markdown(third)["luck"].splitlines()[2:] == []
    assert "| 94.00 |" in found["digits"]  # held-out images do not prefer search 2
    held = line("SAM", 300, 99.0, tested=False) | {"task": "digits, search 2"}
    of_second = report.markdown([*MADE, *again, held])["digits"]
    assert "| 2 + 2 | 2.00 | 2.00 | 93.00 |" in of_second
    assert report.markdown(again)["digits"]
    report.draw([*MADE, *again], tmp_path / "figure.png")


def test_no_two_searches_share_a_seed(monkeypatch, tmp_path):
    monkeypatch.setitem(tasks.TASKS, "digits", task(epochs=1))
    for search in ("1", "2", "3", "3"):  # the last one finds all lines
        command = ["protocol.py", "--rows", "SGD", "--search", search]
        monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "a.jsonl")])
        protocol.main()
    kept = protocol.read(tmp_path / "a.jsonl")
    seeds = lambda name, tested: {
        x["seed"] for x in kept if (x["task"], x.get("tested")) == (name, tested)
    }
    assert seeds("digits", True) == seeds("digits, search 2", True) == {0, 1}
    assert seeds("digits", False) == {100}
    assert seeds("digits, search 2", False) == {200}
    assert seeds("digits, search 3", False) == {300}
    assert len(kept) == 3 * (1 + 2 + 2)
    with pytest.raises(SystemExit, match="numbers 1, 2, 3, .*; got 0"):
        tasks.searched("digits", tasks.TASKS["digits"], 0)
    begun = [x["values"]["decay"] for x in kept if x.get("tested") is False]
    assert begun[::2] == [5e-4, 5e-4, 2e-3]


def test_the_committed_results_are_those_of_the_tasks_as_they_are():
    kept = protocol.read(study.RESULTS / "protocol.jsonl")
    settings = {x["task"]: x["settings"] for x in kept if "settings" in x}
    assert "digits" in settings
    for name, known in settings.items():
        task, _, search = name.partition(", search ")
        found, of = tasks.searched(task, tasks.TASKS[task], int(search or 1))
        assert found == name
        now = json.loads(json.dumps(dataclasses.asdict(of)))
        assert known | {"seeds": now["seeds"]} == now, name
    tested = [x for x in kept if x.get("tested")]
    assert not {x["seed"] for x in tested} & {
        x["seed"] for x in kept if x.get("tested") is False
    }
    for row in {x["row"] for x in tested}:
        of = lambda name, row=row: {
            json.dumps(x["values"])
            for x in tested
            if (x["task"], x["row"]) == (name, row)
        }
        assert all(len(of(name)) <= 1 for name in settings), row
