"""The list of deliberate breaks keeps up with the code that it breaks."""

import pytest

from tests.wrong_engines import BREAKS, ROOT, Break


@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.name)
def test_every_break_matches_one_place(each: Break) -> None:
    """Each break matches one place in the code; a slow run elsewhere shows whether the tests notice it."""
    assert (ROOT / each.file).read_text().count(each.right) == 1
