"""docs/reliability.md names tests that exist, and counts the cases that they try."""

import re
from pathlib import Path

import extreme_norms
import harness
import pytest
import saved_training
import test_injected
import test_killed
import test_sweep
import test_trees

HERE = Path(__file__).parent
PAGE = harness.page("reliability.md")
KILLS = test_killed.KILLS_BETWEEN + test_killed.KILLS_IN_A_WRITE
TRAINED = len(saved_training.TRAINED)
CASES = {
    "test_resumes_to_the_bit": TRAINED * KILLS,
    "test_resumes_on_another_number_of_devices": TRAINED,
    "test_a_fault_leaves_nothing_behind": len(test_injected.INJECTED)
    * len(test_injected.CASES),
    "test_extreme_norms": len(extreme_norms.RULES) * len(extreme_norms.SEQUENCES),
    "test_structure_and_dtypes_stay": test_trees.ABSTRACT,
    "test_one_ball_around_all_that_is_not_masked": test_trees.NUMERIC,
    "test_a_complex_leaf_is_refused_with_advice": test_trees.COMPLEX,
    "test_random_programs": test_sweep.PROGRAMS,
}


def test_numbers_of_cases():
    rows = re.findall(r"\| ([\d,]+) \| `test_\w+\.py::(\w+)` \|", PAGE)
    assert {name: int(cases.replace(",", "")) for cases, name in rows} == CASES
    assert f"{extreme_norms.STEPS} steps" in PAGE
    assert f"first {test_injected.STEPS} steps" in PAGE
    assert f"all {test_killed.STEPS} steps" in PAGE


@pytest.mark.parametrize("trap", range(1, 11))
def test_each_trap_is_held_by_tests(trap):
    text = PAGE.split(f"\n**{trap}. ")[1].split("\n**")[0].split("\n## ")[0]
    assert re.search(r"test_\w+\.py::test_\w+", text)


def test_the_tests_exist():
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) == len(set(re.findall(r"::(\w+)", PAGE))) > 30
    for file, test in named:
        assert f"\ndef {test}(" in next(HERE.rglob(file)).read_text(), f"{file}::{test}"
