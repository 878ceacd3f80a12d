r"""Rows in the form that COPY reads.

Note [The JSON encoder writes what COPY reads]
    A row as a JSON array without its brackets is a line of CSV: texts are in quotes, the escape is a backslash, the
    null is ``null``, and PostgreSQL can read the numbers, booleans and times. One call of a C function writes a line,
    or many; a line that is put together value by value takes six times as long. Only control characters differ: JSON's
    ``\n`` is two characters to CSV, so each such escape is replaced by its control character.
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

_encoder: Final = msgspec.json.Encoder()
_encode, _encode_lines = _encoder.encode, _encoder.encode_lines
_ESCAPED: Final = re.compile(rb"\\(?:u([0-9a-f]{4})|(.))")
_COPY: Final = sql.SQL("COPY {} ({}) FROM STDIN ({})")
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
        self._copy = _COPY.format(sql.Identifier(table.name), self.columns, FORMAT).as_bytes()

    @property
    def columns(self) -> sql.Composed:
        """The columns of a row, as a list for COPY."""
        return sql.SQL(", ").join(map(sql.Identifier, self._names))

    def append(self, cursor: Cursor, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append *rows* to the table."""
        with cursor.copy(self._copy) as copy:
            copy.write(lines([self.values(row) for row in rows]))

    def values(self, row: Mapping[str, Any]) -> Sequence[Any]:
        """Return the values of *row* in the order of the columns, JSON as its text."""
        values: Sequence[Any] = self._values(row)
        if not self._json:
            return values
        texts = list(values)
        for index in self._json:
            if texts[index] is not None:
                texts[index] = _encode(texts[index]).decode()
        return texts


def lines(rows: Sequence[Sequence[Any]]) -> bytes:
    """Return the values of each of *rows*, none of them JSON, as a line with its line end."""
    if not rows:
        return b""
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
