"""What credit note events say of a note and its lines.

Source: https://docs.stripe.com/api/credit_notes/object.

Note [Where a credit note's money goes]
    ``amount = pre + post`` and ``post = refunds + out of band + to the balance``. Since basil a note tells all
    but the last; before, it named one refund without its amount, and no pre and post. What the note cannot
    tell is null until something else tells it, and that is no anomaly; what it tells and does not add up is
    one, and nothing is guessed. The balance transaction that a note made, once it is seen, tells its part.
"""

from typing import Final

from msgspec import UNSET, Struct, UnsetType

from schemas.kinds import Kind
from worker.folds.facts import Anomaly, Change, Event, Facts, Row, Value
from worker.folds.join import Shape, unknown_status
from worker.folds.reading import Name, Reader, Reference, Seconds, Told, Whole, carried, moment, references, say

TYPES: Final = ("credit_note.created", "credit_note.updated", "credit_note.voided", "payfold.credit_note.observed")


class _Refund(Struct):
    amount_refunded: Whole


class _Line(Struct):
    id: Name
    amount: Whole | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    discount_amount: Whole | UnsetType | None = UNSET
    invoice_line_item: Reference | UnsetType = UNSET
    quantity: Whole | UnsetType | None = UNSET
    type: str | UnsetType | None = UNSET


class _Lines(Struct):
    data: list[_Line]
    has_more: bool = False


class CreditNote(Struct):
    """The fields of a credit note that are kept."""

    id: Name
    amount: Whole | UnsetType | None = UNSET
    created: Seconds | UnsetType | None = UNSET
    currency: str | UnsetType | None = UNSET
    customer: Reference | UnsetType = UNSET
    customer_balance_transaction: Reference | UnsetType = UNSET
    effective_at: Seconds | UnsetType | None = UNSET
    invoice: Reference | UnsetType = UNSET
    lines: _Lines | UnsetType | None = UNSET
    memo: str | UnsetType | None = UNSET
    number: str | UnsetType | None = UNSET
    out_of_band_amount: Whole | UnsetType | None = UNSET
    post_payment_amount: Whole | UnsetType | None = UNSET
    pre_payment_amount: Whole | UnsetType | None = UNSET
    reason: str | UnsetType | None = UNSET
    refund: Reference | UnsetType = UNSET
    refunds: list[_Refund] | UnsetType | None = UNSET
    status: str | UnsetType | None = UNSET
    type: str | UnsetType | None = UNSET
    voided_at: Seconds | UnsetType | None = UNSET


_reader = Reader(CreditNote)
_RANKS: Final = {"issued": 0, "void": 1}


def fold(event: Event) -> tuple[Facts, ...]:
    """Return what *event*, of one of ``TYPES``, says of its credit note and of the lines that it shows.

    Raises:
        Unfoldable: when the note in it cannot be read.
    """
    note, before = _reader.read(event.payload)
    told = None if before is None else _told(before)
    moments = {}
    if note.status == "void":
        at = moment(note.voided_at)
        moments["voided_at"] = at if isinstance(at, type(event.created)) else event.created
    facts = say(
        event, "credit_notes", note.id, after=_told(note), before=told, rank=_rank(note.status), moments=moments
    )
    return (facts, *_lines(event, note))


def _rank(status: object) -> int:
    return _RANKS.get(str(status), 0)


def _told(note: CreditNote) -> Told:
    return Told(
        carried(
            number=note.number,
            status=note.status,
            type=note.type,
            reason=note.reason,
            currency=note.currency,
            amount=note.amount,
            pre_payment_amount=note.pre_payment_amount,
            post_payment_amount=note.post_payment_amount,
            refunded_amount=_refunded(note),
            out_of_band_amount=note.out_of_band_amount,
            memo=note.memo,
            created=moment(note.created),
            effective_at=moment(note.effective_at),
            # A first page says nothing of whether the lines that were seen before were all.
            lines_complete=True if isinstance(note.lines, _Lines) and not note.lines.has_more else UNSET,
            _refund=note.refund if note.refund is UNSET else note.refund is not None,
            _balance=UNSET
            if note.customer_balance_transaction is UNSET
            else note.customer_balance_transaction is not None,
        ),
        {
            **references(
                customer=note.customer,
                invoice=note.invoice,
                customer_balance_transaction=note.customer_balance_transaction,
            ),
        },
    )


def _refunded(note: CreditNote) -> int | UnsetType:
    """The sum of the refunds since basil; unknown from the one refund's id before."""
    if isinstance(note.refunds, list):
        return sum(refund.amount_refunded for refund in note.refunds)
    return UNSET


def _lines(event: Event, note: CreditNote) -> tuple[Facts, ...]:
    """Lines never change once the note is issued, so all that were ever seen belong to it."""
    if not isinstance(note.lines, _Lines):
        return ()
    return tuple(
        say(
            event,
            "credit_note_lines",
            line.id,
            after=Told(
                carried(
                    type=line.type,
                    description=line.description,
                    quantity=line.quantity,
                    amount=line.amount,
                    discount_amount=line.discount_amount,
                ),
                {"credit_note": note.id, **references(invoice_line_item=line.invoice_line_item)},
            ),
            before=None,
            root=note.id,
        )
        for line in note.lines.data
    )


# From here on: what follows from the joined row.


def _infer(row: Row) -> None:
    _infer_sides(row)
    post, out_of_band = row["post_payment_amount"], row["out_of_band_amount"]
    has_balance = row.get("_balance")
    if row["refunded_amount"] is None and row.get("_refund") is False:
        row["refunded_amount"] = 0
    refunded = row["refunded_amount"]
    if refunded is None and isinstance(post, int) and has_balance is False:
        row["refunded_amount"] = refunded = post - _whole(out_of_band)
    if isinstance(post, int) and isinstance(refunded, int):
        rest = post - refunded - _whole(out_of_band)
        adds_up = rest > 0 if has_balance else rest == 0
        row["to_balance_amount"] = rest if adds_up else None
    elif isinstance(post, int) and isinstance(listed := row.get("_to_balance"), int):
        # The balance transaction tells what the note could not, and with it what is left for the refund.
        row["to_balance_amount"] = listed
        row["refunded_amount"] = post - listed - _whole(out_of_band)


def _whole(value: Value) -> int:
    """Stripe says null where nothing went out of band."""
    return value if isinstance(value, int) else 0


def _infer_sides(row: Row) -> None:
    """Before basil's pre and post, a note was wholly one or the other, by its type."""
    if row["pre_payment_amount"] is not None or row["post_payment_amount"] is not None:
        return
    if row["type"] == "pre_payment":
        row["pre_payment_amount"], row["post_payment_amount"] = row["amount"], 0
    elif row["type"] == "post_payment":
        row["pre_payment_amount"], row["post_payment_amount"] = 0, row["amount"]


def _anomalies(row: Row) -> list[Anomaly]:
    amount, pre, post = row["amount"], row["pre_payment_amount"], row["post_payment_amount"]
    refunded, to_balance = row["refunded_amount"], row["to_balance_amount"]
    found = unknown_status(row, _RANKS)
    if isinstance(amount, int) and isinstance(pre, int) and isinstance(post, int) and amount != pre + post:
        found.append(Anomaly("credit_note_sides", {"amount": amount, "pre_payment": pre, "post_payment": post}))
    if isinstance(post, int) and isinstance(refunded, int) and to_balance is None:
        out_of_band = _whole(row["out_of_band_amount"])
        split = {"post_payment": post, "refunded": refunded, "out_of_band": out_of_band}
        found.append(Anomaly("credit_note_split", split))
    return found


_SHOWN: Final = (
    *("status", "type", "reason", "currency", "amount", "pre_payment_amount", "post_payment_amount"),
    *("refunded_amount", "out_of_band_amount", "to_balance_amount"),
    *("customer", "invoice", "customer_balance_transaction"),
)


def _changes(before: Row | None, after: Row) -> list[Change]:
    if after["status"] not in ("issued", "void") or (before is not None and before["status"] == after["status"]):
        return []
    kind: Kind = "credit_note.voided" if after["status"] == "void" else "credit_note.issued"
    known = None if before is None else {name: before[name] for name in _SHOWN}
    return [Change(kind, known, {name: after[name] for name in _SHOWN})]


SHAPE: Final = Shape(
    table="credit_notes",
    subject="credit_note",
    empty={
        **dict.fromkeys(
            (
                *("number", "status", "type", "reason", "currency", "amount"),
                *("pre_payment_amount", "post_payment_amount", "refunded_amount", "out_of_band_amount"),
                *("to_balance_amount", "customer", "invoice", "customer_balance_transaction"),
                *("memo", "created", "effective_at", "voided_at"),
            )
        ),
        "lines_complete": False,
    },
    rank_of=lambda row: _rank(row["status"]),
    infer=_infer,
    anomalies=_anomalies,
    changes=_changes,
    # Whether the old shape named a refund, and the new one a balance transaction, is no column of its own.
    keeps_all=False,
)

LINE_SHAPE: Final = Shape(
    table="credit_note_lines",
    subject="credit_note_line",
    empty=dict.fromkeys(
        ("credit_note", "type", "invoice_line_item", "description", "quantity", "amount", "discount_amount")
    ),
    keeps_all=False,
    leader="credit_notes",
)
