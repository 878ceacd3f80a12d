"""Mutants of the folds: the lists agree with the code, and the literal tests notice a few mutants in each run."""

import re
import subprocess
import sys

import pytest

from tests.mutants import ROOT, made
from tests.mutants_explained import EXPLAINED
from tests.mutate import BEYOND_MEMORY

SAMPLE = 6
NEVER_EXPLAINED = ("arithmetic", "rank", "sign")
TIME = re.compile(r'"(\w+_at|as_of|created|updated)"')


def test_every_listed_name_is_a_mutants() -> None:
    """Each name listed as explained, or as left to tests with a database, belongs to one mutant."""
    names = [each.name for each in made()]

    assert len(set(names)) == len(names)
    assert {*EXPLAINED, *BEYOND_MEMORY.read_text().splitlines()} - set(names) == set()


def test_every_operator_makes_mutants() -> None:
    """None is left without work because the code names something in another way now."""
    kinds = {each.kind for each in made()}
    arguments = {(each.file, each.right) for each in made() if each.kind == "argument"}

    assert kinds == {
        *("argument", "arithmetic", "change", "column", "comparison", "condition", "flag", "function"),
        *("number", "rank", "sign", "statement", "word"),
    }
    assert {
        ("worker/folds/credit_note.py", "root=note.id"),
        ("worker/folds/credit_note.py", 'leader="credit_notes"'),
        ("worker/folds/refund.py", "rank=rank"),
    } <= arguments


def test_few_mutants_are_explained() -> None:
    """At most one mutant in twenty is excused by an explanation, and none of a rank, a sign, or a column but a time."""
    mutants = made()
    explained = [each for each in mutants if each.name in EXPLAINED]

    assert len(explained) <= len(mutants) / 20
    assert [each.name for each in explained if each.kind in NEVER_EXPLAINED] == []
    assert [each.name for each in explained if each.kind == "column" and not TIME.fullmatch(each.right)] == []


def test_a_few_mutants_are_noticed(request: pytest.FixtureRequest) -> None:
    """The literal tests fail for mutants that the run's seed chooses; a surviving mutant is printed with its change."""
    seed = str(request.config.getoption("hypothesis_seed"))
    options = ["--memory", "--sample", str(SAMPLE), "--slots", "1", "--seed", seed]
    ran = subprocess.run([sys.executable, "-m", "tests.mutate", *options], cwd=ROOT, capture_output=True, check=False)

    assert ran.returncode == 0, (
        f"python -m tests.mutate {' '.join(options)}\n{ran.stdout.decode()}{ran.stderr.decode()}"
    )
