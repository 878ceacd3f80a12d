"""PostgreSQL reads the rows and arrays that Payfold writes for COPY with their original values."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from schemas import database, tables
from worker.folding import copy_rows

pytestmark = pytest.mark.integration

# Texts that PostgreSQL can hold; characters with a meaning in JSON, CSV or arrays are frequent.
texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), st.sampled_from('\\"\b\n\r\t,{}'))
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
moments = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001 - bounds of aware times
FORM = copy_rows.Form(tables.payment_links)


@given(st.lists(st.tuples(st.none() | texts, st.none() | st.booleans(), st.none() | values, st.none() | moments)))
@example(
    [("\\", None, {"\\": "\\\n"}, None), ("null", None, "null", None), ("", None, "", None), ("\\.", None, [], None)]
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_arrive_as_they_are(
    engine: Engine, written: list[tuple[str | None, bool | None, Any, datetime | None]]
) -> None:
    """Any text, JSON, boolean, time or null has the same value after COPY."""
    rows = [
        {
            "account": "",
            "livemode": False,
            "id": f"plink_{number}",
            "event_id": "evt_1",
            "active": active,
            "url": url,
            "currency": None,
            "metadata": metadata,
            "created": created,
            "as_of": datetime(2026, 11, 1, tzinfo=UTC),
        }
        for number, (url, active, metadata, created) in enumerate(written)
    ]
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute("TRUNCATE payment_links")
        FORM.append(cursor, rows)
        cursor.execute("SELECT url, active, metadata, created FROM payment_links ORDER BY length(id), id")
        assert cursor.fetchall() == written


@given(st.lists(texts), st.lists(st.integers(-(2**63), 2**63 - 1)), st.lists(st.booleans()))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_arrive_as_they_are(engine: Engine, words: list[str], numbers: list[int], truths: list[bool]) -> None:
    """PostgreSQL reads an array of any texts, numbers or booleans with the same elements."""
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        cursor.execute(
            "SELECT %s::text[], %s::bigint[], %s::boolean[]",
            (database.text_array(words), database.integer_array(numbers), database.boolean_array(truths)),
        )
        assert cursor.fetchall() == [(words, numbers, truths)]
