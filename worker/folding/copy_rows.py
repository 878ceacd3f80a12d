r"""Rows in the form that COPY reads.

Note [The JSON encoder writes what COPY reads]
    A row as a JSON array without its brackets is a line of CSV: texts are in quotes, the escape is a backslash, the
    null is ``null``, and PostgreSQL can read the numbers, booleans and times. One call of a C function writes the line;
    a line that is put together value by value takes six times as long. Only control characters differ: JSON's ``\n``
    is two characters to CSV, so each such escape is replaced by its control character.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

import msgspec
from psycopg import sql
from sqlalchemy import Table
from sqlalchemy.dialects.postgresql import JSONB

from schemas.database import Cursor

FORMAT: Final = sql.SQL("FORMAT csv, NULL 'null', ESCAPE '\\'")

_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_ESCAPED: Final = re.compile(rb"\\(?:u([0-9a-f]{4})|(.))")
_MAY_BE_CONTROL: Final = re.compile(rb'\\[^"]')
"""Most backslashes of a line escape a quote. Only behind another one may a control character be found."""
_CONTROLS: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class Form:
    """Writes the rows of one *table*, with all columns in their order or only the columns *named*."""

    def __init__(self, table: Table, named: Sequence[str] = ()) -> None:
        names = named or [column.name for column in table.columns]
        self._names = names
        self._json = [index for index, name in enumerate(names) if isinstance(table.columns[name].type, JSONB)]
        self._values = itemgetter(*names)

    @property
    def columns(self) -> sql.Composed:
        """The columns of a row, as a list for COPY."""
        return sql.SQL(", ").join(map(sql.Identifier, self._names))

    def line(self, row: Mapping[str, Any]) -> bytes:
        """Return *row* as a line with its line end."""
        return lines([self.values(row)])

    def values(self, row: Mapping[str, Any]) -> Sequence[Any]:
        """Return the values of *row* in the order of the columns, JSON as its text."""
        if not self._json:
            return self._values(row)  # type: ignore[no-any-return]  # a tuple
        values = list(self._values(row))
        for index in self._json:
            if values[index] is not None:
                values[index] = _encode(values[index]).decode()
        return values


def lines(rows: Sequence[Sequence[Any]]) -> bytes:
    """Return the values of each of *rows*, none of them JSON, as a line with its line end."""
    # A line end inside a text is written as an escape, so this separates rows and nothing else.
    written = _encode_lines(rows)[1:-2].replace(b"]\n[", b"\n") + b"\n"
    if not _MAY_BE_CONTROL.search(written):
        return written
    return b"\n".join(
        [_ESCAPED.sub(_unescaped, each) if _MAY_BE_CONTROL.search(each) else each for each in written.split(b"\n")]
    )


def _unescaped(match: re.Match[bytes]) -> bytes:
    number, letter = match.groups()
    if number is not None:
        return chr(int(number, 16)).encode()
    return _CONTROLS.get(letter, match[0])


def into(cursor: Cursor, table: sql.Identifier, columns: sql.Composed, lines: Iterable[bytes]) -> None:
    """Append *lines* to *table*."""
    with cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN ({})").format(table, columns, FORMAT)) as copy:
        copy.write(b"".join(lines))
