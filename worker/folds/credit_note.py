"""Folds credit note events into credit notes and their lines.

Source: https://docs.stripe.com/api/credit_notes/object.

Note [Where a credit note's money goes]
    ``amount = pre + post`` and ``post = refunds + out of band + to the balance``. Since basil a note carries all these
    amounts except the last. Before basil it named one refund without the amount, and carried neither pre nor post. A
    part that the note does not carry is null until another object shows it, which is no anomaly. Parts that do not add
    up are an anomaly, and nothing is guessed. The balance transaction that a note made shows the part of the balance.

    The events of a refund name no note. So ``with_refund`` lays the refund that an old note names on the note's row
    last. The refund's whole amount belongs to the note: "the sum of refund, credit and outside of Stripe amounts must
    equal the credit note total" (https://docs.stripe.com/api/credit_notes/create, before basil let a note have a part
    of a refund). That also holds for a refund that fails or is canceled: only memo and metadata of an issued note
    change (https://docs.stripe.com/api/credit_notes/update), and a note is voided only while its invoice is open, so
    never after a refund (https://docs.stripe.com/api/credit_notes/void). A refund in another currency does not count,
    because its part of the note is unknown.
"""

from collections.abc import Mapping
from typing import Final, TypeAlias

from msgspec import UNSET, Struct, UnsetType, structs

from schemas.kinds import Kind
from schemas.own_events import observed
from worker.folds.balance import LISTED
from worker.folds.facts import Anomaly, Change, Event, Facts, Row, Value
from worker.folds.join import Joined, RowSpec, unknown_status
from worker.folds.reading import (
    Name,
    Reader,
    Reference,
    Reported,
    Seconds,
    Whole,
    carried,
    make_facts,
    moment,
    references,
)

TYPES: Final = ("credit_note.created", "credit_note.updated", "credit_note.voided", observed("credit_note"))


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
"""The amount that was refunded, and the amount that went to the balance."""
_RANKS: Final = {"issued": 0, "void": 1}


def fold(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``TYPES``, about its credit note and the lines that it lists.

    Raises:
        Unfoldable: when the note in it cannot be read.
    """
    note, before = _reader.read(event.payload)
    reported = None if before is None else _reported(before)
    moments = {}
    if note.status == "void":
        at = moment(note.voided_at)
        moments["voided_at"] = at if isinstance(at, type(event.created)) else event.created
    facts = make_facts(
        event, "credit_notes", note.id, after=_reported(note), before=reported, rank=_rank(note.status), moments=moments
    )
    return (facts, *_lines(event, note))


def _rank(status: object) -> int:
    return _RANKS.get(str(status), 0)


def _reported(note: CreditNote) -> Reported:
    return Reported(
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
            # A first page does not show whether earlier events listed all lines, so it leaves the column as it is.
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
    """Return the sum of the refunds, which a note lists since basil. Before, it had only the id of one refund."""
    if isinstance(note.refunds, list):
        return sum(refund.amount_refunded for refund in note.refunds)
    return UNSET


def _lines(event: Event, note: CreditNote) -> tuple[Facts, ...]:
    """Return the facts of the note's lines. They never change after the issue, so each line that was seen stays."""
    if not isinstance(note.lines, _Lines):
        return ()
    return tuple(
        make_facts(
            event,
            "credit_note_lines",
            line.id,
            after=Reported(
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


# From here on: inferences from the joined row.


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
    """Return both parts of *share*, a missing one computed from the other; None where they contradict the note.

    *has_balance* is True where the note names a balance transaction, False where it reports none, and None where it
    does neither.
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
    """Return the sum of refunds and the part of the balance; None where the amount after the payment is unknown."""
    post = row["post_payment_amount"]
    return post - _whole(row["out_of_band_amount"]) if isinstance(post, int) else None


def _listed(row: Row) -> int | None:
    """Return the amount that the ledger lists for the note, in the note's currency.

    It is that of the balance transaction that the note names. For a note that names none it is that of its only
    transaction, None where there are several.
    """
    named = row["customer_balance_transaction"]
    ones = [value for name, value in row.items() if name.startswith(LISTED) and named in (None, name[len(LISTED) :])]
    found = [one["amount"] for one in ones if isinstance(one, Mapping) and one["currency"] == row["currency"]]
    return _known(found[0]) if len(found) == 1 else None


def _known(value: Value) -> int | None:
    return value if isinstance(value, int) else None


def _whole(value: Value) -> int:
    """Return *value*, and 0 for null, which Stripe sends where nothing was paid out of band."""
    return value if isinstance(value, int) else 0


def _infer_sides(row: Row) -> None:
    """Set pre and post of a note from before basil: the whole amount is one or the other, by the note's type."""
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
    """Return an anomaly where the refunds leave a part of the note over and nothing names its destination."""
    refunded = row["refunded_amount"]
    is_lost = _share(row) is not None and isinstance(refunded, int) and row["to_balance_amount"] is None
    return [Anomaly(SPLIT, _detail(row, _known(refunded), None))] if is_lost else []


def _detail(row: Row, refunded: int | None, to_balance: int | None) -> dict[str, Value]:
    """Return the amounts of an anomaly's detail, without those of *refunded* and *to_balance* that are None."""
    parts = {"refunded": refunded, "to_balance": to_balance}
    known = {name: part for name, part in parts.items() if part is not None}
    return {"post_payment": row["post_payment_amount"], "out_of_band": _whole(row["out_of_band_amount"]), **known}


# From here on: the refund of an old note, laid on the note's row.


def is_open(row: Row) -> bool:
    """Return whether *row* names a refund by its id alone. The refund's own row may then show the note's parts."""
    return row["refund"] is not None


def with_refund(joined: Joined, refund: Row | None) -> Joined:
    """Return the open note *joined*, made by its own events and the ledger, with its *refund* laid on.

    Where the refund contradicts the other parts, both the refunded amount and that of the balance are null.
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


ROW_SPEC: Final = RowSpec(
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
    # A note may report that it has no refund or no balance transaction, and no column keeps that.
    keeps_all=False,
    ranks=_RANKS,
)

LINE_SPEC: Final = RowSpec(
    table="credit_note_lines",
    subject="credit_note_line",
    empty=dict.fromkeys(
        ("credit_note", "type", "invoice_line_item", "description", "quantity", "amount", "discount_amount")
    ),
    keeps_all=False,
    leader="credit_notes",
    ranks=_RANKS,
)
