"""What a rule of money is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: its *name*, its text in one line, and its *query*.

    The query returns, for each row that the rule is about: account, livemode, id, state, currency, held, expected,
    detail and at. The detail of a row that is not provable is one of a few reasons, by which such rows are counted. The
    query computes in numeric, since the sum of odd amounts may be larger than a bigint holds, and joins by a hash or an
    index. *explains* names the values that the rule needs and compares.
    """

    name: str
    title: str
    explains: str
    table: str
    query: str
