"""The list of deliberate breaks keeps up with the code that it breaks."""

import pytest

from tests.wrong_engines import BREAKS, ROOT, Break


@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.name)
def test_what_is_to_be_broken_is_there(each: Break) -> None:
    """Each break matches one place in the code; a slow run elsewhere shows whether the tests notice it."""
    assert (ROOT / each.file).read_text().count(each.right) == 1
