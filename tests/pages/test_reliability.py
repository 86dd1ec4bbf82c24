"""The page on reliability names tests that exist, and counts the cases they try."""

import importlib.util
import re
from pathlib import Path

import extreme_norms
import harness
import pytest
import saved_training
import wrapped

TESTS = Path(__file__).parents[1]
PAGE = harness.page("reliability.md")


def module(name):
    """The constants of a module of tests, wherever it lies."""
    (path,) = TESTS.rglob(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"constants_of_{name}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_numbers_of_cases():
    injected, trees = map(module, ("test_injected", "test_trees"))
    trained = len(saved_training.TRAINED)
    kills = saved_training.KILLS_BETWEEN + saved_training.KILLS_IN_A_WRITE
    rows = re.findall(r"\| ([\d,]+) \| `test_\w+\.py::(\w+)` \|", PAGE)
    assert {name: int(cases.replace(",", "")) for cases, name in rows} == {
        "test_resumes_to_the_bit": trained * kills,
        "test_resumes_on_another_number_of_devices": trained,
        "test_a_fault_leaves_nothing_behind": len(injected.INJECTED)
        * len(injected.CASES),
        "test_extreme_norms": len(extreme_norms.RULES) * len(extreme_norms.SEQUENCES),
        "test_structure_and_dtypes_stay": trees.ABSTRACT,
        "test_one_ball_around_all_that_is_not_masked": trees.NUMERIC,
        "test_a_complex_leaf_is_refused_with_advice": trees.COMPLEX,
        "test_random_programs": wrapped.PROGRAMS,
    }
    assert f"{extreme_norms.STEPS} steps" in PAGE
    assert f"first {injected.STEPS} steps" in PAGE
    assert f"all {saved_training.STEPS} steps" in PAGE


@pytest.mark.parametrize("trap", range(1, 11))
def test_each_trap_is_held_by_tests(trap):
    text = PAGE.split(f"\n**{trap}. ")[1].split("\n**")[0].split("\n## ")[0]
    assert re.search(r"test_\w+\.py::test_\w+", text)


def test_the_tests_exist():
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) == len(set(re.findall(r"::(\w+)", PAGE))) > 30
    for file, test in named:
        (path,) = TESTS.rglob(file)
        assert f"\ndef {test}(" in path.read_text(), f"{file}::{test}"
