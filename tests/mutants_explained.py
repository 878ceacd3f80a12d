"""The mutants that behave exactly as the code does, each with the reason."""

from collections.abc import Mapping
from typing import Final

_FOLDED_AGAIN: Final = "a rank of the row above the true one only lets it be folded again from all its events"

_NO_LOOKUP: Final = "without an event, or a row that it could set, there is nothing to look up, and nothing is found"
_EVENT_ALONE: Final = (
    "an explanation names the event that decided, and neither its source nor its time as the payment has it"
)
_BINARY: Final = "both formats of the driver give the same values"
_ALWAYS_AMOUNTS: Final = "every step of a balance has whole amounts, and one of the ledger those before it too"
_LISTED: Final = "the values under such names are mappings, and no other value of a note is one"

_BOOK: Final = "schemas/migrations/versions/0023_book_by_keys.py order_book: "

EXPLAINED: Final[Mapping[str, str]] = {
    'worker/folds/charge.py _rank_of: "released_at" -> "as_of"': _FOLDED_AGAIN,
    'worker/folds/portal.py module: "expired_at" -> "as_of"': _FOLDED_AGAIN,
    "worker/folds/customer.py module: False -> True": "every event of a customer carries whether it is deleted",
    "worker/folds/balance.py _by_ledger: rank=_BY_LEDGER -> **{}": (
        "the rank of the ledger is the one that facts have anyway"
    ),
    "worker/folds/balance.py _change_of: not isinstance(before, int) -> False": _ALWAYS_AMOUNTS,
    "worker/folds/balance.py _change_of: not isinstance(after, int) -> False": _ALWAYS_AMOUNTS,
    "worker/folds/balance.py _broken: {} -> False": _ALWAYS_AMOUNTS,
    "worker/folds/checkout_session.py kind_of_step: 1 -> 2": "an unknown status is below all others, by 1 or by 2",
    "worker/folds/credit_note.py _split: refunded is not None -> True": (
        "without it the other part is known, so the next condition is false"
    ),
    "worker/folds/credit_note.py _split: 0 -> False": "False is 0 in a difference",
    "worker/folds/credit_note.py _listed: name.startswith(LISTED) -> True": _LISTED,
    "worker/folds/credit_note.py _listed: isinstance(one, Mapping) -> True": _LISTED,
    "worker/folds/credit_note.py with_refund: amount is None -> False": (
        "without the refund's amount the parts are those that the note itself shows, and it has them"
    ),
    "worker/folds/payment.py decide: 2 -> 3": "ids differ, so that no third value is compared",
    "worker/proof/explain.py module: False -> True": (
        "only the last step of a path shows its doubt, and this path has no step"
    ),
    "worker/proof/explain.py _with_refund: refund is None -> False": (
        "a note on which no refund was laid is what it was"
    ),
    'worker/proof/explain.py _moved_by: each["object_id"] == row["id"] -> True': (
        "a transaction mentions notes and customers, so all events of a charge are its own"
    ),
    "worker/proof/explain.py _moved_by: at is not None -> True": "no event is without the time of its creation",
    'worker/proof/explain.py _moved_by: "as_of" -> "as_of~"': _EVENT_ALONE,
    'worker/proof/explain.py _moved_by: "source" -> "source~"': _EVENT_ALONE,
    "worker/proof/explain.py _decider: own is None -> False": _NO_LOOKUP,
    "worker/proof/explain.py _decider: joined is None -> False": _NO_LOOKUP,
    "worker/proof/explain.py _decider: event_id is None -> False": _NO_LOOKUP,
    "worker/proof/explain.py _decider: True -> False": _BINARY,
    "worker/proof/explain.py _reports_of: True -> False": _BINARY,
    "worker/proof/explain.py _column: reports is None -> True": "no event reports a column of the key as a column",
    "worker/proof/explain.py _dashboard: not place -> False": (
        "a table without a place has no column for it either, so its value is None"
    ),
    f"{_BOOK}SELECT c.captured_at IS NOT NULL OR (c.status = 'succeeded' AND c.captured) IS TRUE AS is_captured -> "
    "SELECT c.captured_at IS NOT NULL OR (c.status = 'succeeded~' AND c.captured) IS TRUE AS is_captured": (
        "every event that shows a charge succeeded and captured gives its row the time of the capture"
    ),
    f"{_BOOK}WHEN p.is_whole AND NOT (l.is_any AND p.amount_refunded > t.known) -> "
    "WHEN p.is_whole AND NOT (l.is_any AND p.amount_refunded >= t.known)": (
        "where both are equal an earlier condition has found it"
    ),
    f"{_BOOK}coalesce(bool_or(x.is_loose AND x.amount IS DISTINCT FROM 0), false) AS is_loose -> "
    "coalesce(bool_or(x.is_loose AND x.amount IS DISTINCT FROM 0), true) AS is_loose": (
        "it is of an order without charges and refunds, and one without charges is read alike"
    ),
    f"{_BOOK}WHEN r.amount < m.taken THEN 'partial' -> WHEN r.amount <= m.taken THEN 'partial'": (
        "where both are equal an earlier condition has found it"
    ),
    f"{_BOOK}), false) AND abs(coalesce(sum(n.amount), 0)) <= 9223372036854775807 -> "
    "), false) AND abs(coalesce(sum(n.amount), 1)) <= 9223372036854775807": "0 and 1 are both small enough",
}
"""By name of the mutant, as ``tests.mutants`` gives it: why no test could notice it."""
