"""What credit note events say of a note and its lines.

Source: https://docs.stripe.com/api/credit_notes/object.

Note [Where a credit note's money goes]
    ``amount = pre + post`` and ``post = refunds + out of band + to the balance``. Since basil a note tells all
    but the last; before, it named one refund without its amount, and no pre and post. What the note cannot
    tell is null until something else tells it, and that is no anomaly; what it tells and does not add up is
    one, and nothing is guessed. The balance transaction that a note made, once it is seen, tells its part.

    The events of a refund name no note, so what the refund that an old note names adds is laid on last, by
    ``with_refund``. All of its amount is the note's: "the sum of refund, credit and outside of Stripe amounts must
    equal the credit note total" (https://docs.stripe.com/api/credit_notes/create, before basil gave notes a part of a
    refund). That also holds of a refund that fails or is canceled: of an issued note only memo and metadata change
    (https://docs.stripe.com/api/credit_notes/update), and it is voided only while its invoice is open, so not where
    something was refunded (https://docs.stripe.com/api/credit_notes/void). An amount in another currency is no known
    part of the note.
"""

from collections.abc import Mapping
from typing import Final, TypeAlias

from msgspec import UNSET, Struct, UnsetType, structs

from schemas.kinds import Kind
from worker.folds.balance import LISTED
from worker.folds.facts import Anomaly, Change, Event, Facts, Row, Value
from worker.folds.join import Joined, Shape, unknown_status
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
SPLIT: Final = "credit_note_split"
_Parts: TypeAlias = tuple[int | None, int | None]
"""What was refunded, and what went to the balance."""
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
                refund=note.refund,
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
    if row["refunded_amount"] is None and row.get("_refund") is False:
        row["refunded_amount"] = 0
    refunded, listed, share = _known(row["refunded_amount"]), _listed(row), _share(row)
    if refunded is not None:
        row["refund"] = None
    if share is None:
        row["to_balance_amount"] = listed
        return
    has_balance = row.get("_balance")
    to_balance = 0 if listed is None and has_balance is False else listed
    parts = _split(share, refunded, to_balance, has_refund=row.get("_refund") is True, has_balance=has_balance)
    row["refunded_amount"], row["to_balance_amount"] = parts or (refunded, None)
    if parts is None:
        row["_contradiction"] = _detail(row, refunded, listed)


def _split(
    share: int, refunded: int | None, to_balance: int | None, *, has_refund: bool, has_balance: Value
) -> _Parts | None:
    """Return the parts of *share*, the one that is None by the other; None where they contradict what the note names.

    A note *has_balance* True where it names a transaction, False where it reports that there is none, else None.
    """
    if refunded is None and to_balance is None:
        return None, None
    if refunded is not None and to_balance is None and has_balance is None and refunded < share:
        return refunded, None
    refunded = share - (to_balance or 0) if refunded is None else refunded
    to_balance = share - refunded if to_balance is None else to_balance
    adds_up = refunded + to_balance == share
    return (refunded, to_balance) if adds_up and refunded >= has_refund and to_balance >= bool(has_balance) else None


def _share(row: Row) -> int | None:
    """Return what refunds and the balance share; None where the side after the payment is not known."""
    post = row["post_payment_amount"]
    return post - _whole(row["out_of_band_amount"]) if isinstance(post, int) else None


def _listed(row: Row) -> int | None:
    """Return what the ledger lists for the note in its currency: of the transaction that it names, else of the one."""
    named = row["customer_balance_transaction"]
    ones = [value for name, value in row.items() if name.startswith(LISTED) and named in (None, name[len(LISTED) :])]
    found = [one["amount"] for one in ones if isinstance(one, Mapping) and one["currency"] == row["currency"]]
    return _known(found[0]) if len(found) == 1 else None


def _known(value: Value) -> int | None:
    return value if isinstance(value, int) else None


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
    found = unknown_status(row, _RANKS)
    if isinstance(amount, int) and isinstance(pre, int) and isinstance(post, int) and amount != pre + post:
        found.append(Anomaly("credit_note_sides", {"amount": amount, "pre_payment": pre, "post_payment": post}))
    contradiction = row.get("_contradiction")
    if isinstance(contradiction, Mapping):
        return [*found, Anomaly(SPLIT, contradiction)]
    return [*found, *_lost(row)]


def _lost(row: Row) -> list[Anomaly]:
    """Return that a part of the note went somewhere that is not named."""
    refunded = row["refunded_amount"]
    is_lost = _share(row) is not None and isinstance(refunded, int) and row["to_balance_amount"] is None
    return [Anomaly(SPLIT, _detail(row, _known(refunded), None))] if is_lost else []


def _detail(row: Row, refunded: int | None, to_balance: int | None) -> dict[str, Value]:
    """Return the parts of *row* that are known, *refunded* and *to_balance* where they are."""
    parts = {"refunded": refunded, "to_balance": to_balance}
    known = {name: part for name, part in parts.items() if part is not None}
    return {"post_payment": row["post_payment_amount"], "out_of_band": _whole(row["out_of_band_amount"]), **known}


# From here on: what the refund lays on that an old note names.


def is_open(row: Row) -> bool:
    """Return whether *row* names a refund by its id alone, which may show the note's parts."""
    return row["refund"] is not None


def with_refund(joined: Joined, refund: Row | None) -> Joined:
    """Return the open note *joined*, as its own events and the ledger make it, with what its *refund* adds laid on.

    Where that contradicts the other parts neither is known.
    """
    row, amount = joined.row, _amount_of(refund, joined.row["currency"])
    if amount is None or _contradicts_itself(joined):
        return joined
    share, to_balance = _share(row), _known(row["to_balance_amount"])
    if share is None:
        return structs.replace(joined, row={**row, "refunded_amount": amount})
    has_balance = True if row["customer_balance_transaction"] is not None else None
    parts = _split(share, amount, to_balance, has_refund=True, has_balance=has_balance)
    refunded, left = parts or (None, None)
    laid: Row = {**row, "refunded_amount": refunded, "to_balance_amount": left}
    found = [Anomaly(SPLIT, _detail(row, amount, to_balance))] if parts is None else _lost(laid)
    return structs.replace(joined, row=laid, anomalies=(*joined.anomalies, *found))


def _amount_of(refund: Row | None, currency: Value) -> int | None:
    if refund is None or currency is None or refund["currency"] != currency:
        return None
    return _known(refund["amount"])


def _contradicts_itself(joined: Joined) -> bool:
    return any(each.kind == SPLIT for each in joined.anomalies)


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
                *("to_balance_amount", "customer", "invoice", "customer_balance_transaction", "refund"),
                *("memo", "created", "effective_at", "voided_at"),
            )
        ),
        "lines_complete": False,
    },
    infer=_infer,
    anomalies=_anomalies,
    changes=_changes,
    # Whether a note reports that it has no refund, or no balance transaction, is no column of its own.
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
