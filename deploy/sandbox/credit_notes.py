"""Credit notes: amounts that a finalised invoice should not have asked for.

The part of a note that an open invoice still asks for lowers the amount due (pre-payment). The rest was paid already
(post-payment) and goes back: as a refund, outside Stripe, or to the customer's balance.
See https://docs.stripe.com/invoicing/integration/programmatic-credit-notes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.sandbox import billing_shapes
from deploy.sandbox.invoices import Invoices
from deploy.sandbox.journal import Object, ParameterError, TransitionError, api_call, copy_of, merged_metadata
from deploy.sandbox.payments import REFUND_LOST, RefundStatus


class CreditNotes(Invoices):
    """Credit notes of invoices."""

    def __init__(self, **parameters: Any) -> None:  # noqa: ANN401 (those of Journal)
        super().__init__(**parameters)
        # By credit note, all its lines, of which the object holds the first page; by invoice, its notes.
        self._note_lines: dict[str, list[Object]] = {}
        self._notes: dict[str, list[str]] = {}
        self._noted_refunds: set[str] = set()

    @api_call
    def issue_credit_note(
        self,
        invoice: str,
        amount: int,
        *,
        refund: int = 0,
        credit: int = 0,
        out_of_band: int = 0,
        lines: Sequence[int] | None = None,
        memo: str | None = None,
        reason: str | None = None,
        refund_status: RefundStatus | None = None,
    ) -> str:
        """Credit *amount* minor units of an open or paid invoice, and return the note's id.

        The part beyond the remaining amount must be split in whole among *refund*, *credit* (to the balance) and
        *out_of_band*. *lines* are the amounts of its lines, one by default. A note that leaves nothing due makes an
        open invoice paid.
        """
        current = self._invoice(invoice, "open", "paid")
        parts = [amount] if lines is None else list(lines)
        pre = min(amount, current["amount_remaining"]) if current["status"] == "open" else 0
        post = amount - pre
        if amount <= 0 or sum(parts) != amount:
            raise ParameterError("a credit note is of more than nothing, and its lines add up to it")
        if min(refund, credit, out_of_band) < 0 or refund + credit + out_of_band != post:
            raise ParameterError(f"{post} was paid already, and goes in whole to refund, credit and out_of_band")
        if amount > self.creditable(invoice):
            raise ParameterError(f"{invoice} has {self.creditable(invoice)} left to credit, not {amount}")

        note = self._chance.id("cn")
        refunds = []
        if refund:
            made = self._refund(self._paid_by(invoice), refund, refund_status)
            self._noted_refunds.add(made)
            refunds.append({"amount_refunded": refund, "payment_record_refund": None, "refund": made, "type": "refund"})
        transaction = None
        if credit:
            transaction = self._post(
                current["customer"], "credit_note", -credit, current["currency"], credit_note=note, invoice=invoice
            )
        snapshot = self._new_note(
            note,
            current,
            parts,
            customer_balance_transaction=transaction,
            memo=memo,
            out_of_band_amount=out_of_band or None,
            post_payment_amount=post,
            pre_payment_amount=pre,
            reason=reason,
            refunds=refunds,
            type="mixed" if pre and post else "pre_payment" if pre else "post_payment",
        )
        self._emit("credit_note.created", snapshot)
        self._lower(current, pre, post)
        return note

    @api_call
    def update_credit_note(
        self, note: str, *, memo: str | None = None, metadata: Mapping[str, str | None] | None = None
    ) -> None:
        """Change a note's memo, or merge its metadata: all that may be changed. Nothing changed has no event."""
        before = self._find("credit_note", note)
        changes: dict[str, Any] = {}
        if memo is not None:
            changes["memo"] = memo
        if metadata is not None:
            changes["metadata"] = merged_metadata(before["metadata"], metadata)
        after, previous = self._change(before, **changes)
        if previous:
            self._emit("credit_note.updated", after, previous)

    @api_call
    def void_credit_note(self, note: str) -> None:
        """Void a note while its invoice is open, which then asks for its amount again."""
        before = self._find("credit_note", note)
        if before["status"] == "void":
            raise TransitionError(f"{note} is void")
        invoice = self._invoice(before["invoice"], "open")
        after, _ = self._change(before, status="void", voided_at=self.now)
        self._emit("credit_note.voided", after)
        self._lower(invoice, -after["pre_payment_amount"], -after["post_payment_amount"])

    def creditable(self, invoice: str) -> int:
        """Return how much of an invoice can still be credited, in minor units.

        An amount that was credited or refunded cannot be credited again.
        """
        notes = [self._find("credit_note", note) for note in self._notes.get(invoice, [])]
        credited = sum(note["amount"] for note in notes if note["status"] == "issued")
        refunded = sum(
            refund["amount"]
            for intent in self.invoice_intents(invoice)
            for refund in self.refunds_of(intent)
            if refund["id"] not in self._noted_refunds and refund["status"] not in REFUND_LOST
        )
        return int(self._find("invoice", invoice)["total"] - credited - refunded)

    def credit_notes_of(self, invoice: str) -> list[Object]:
        """Return the credit notes of an invoice, oldest first, void ones too."""
        return [self.object("credit_note", note) for note in self._notes.get(invoice, [])]

    def credit_note_lines(self, note: str) -> list[Object]:
        """Return all lines of a credit note, of which the note itself holds the first ten."""
        return [copy_of(line) for line in self._note_lines[note]]

    def _new_note(self, note: str, invoice: Object, parts: Sequence[int], **fields: Any) -> Object:  # noqa: ANN401 (JSON values)
        lines = [self._note_line(invoice, number, part) for number, part in enumerate(parts)]
        amount = sum(parts)
        notes = self._notes.setdefault(invoice["id"], [])
        notes.append(note)
        self._note_lines[note] = lines
        snapshot = billing_shapes.credit_note(
            {
                "id": note,
                "amount": amount,
                "created": self.now,
                "currency": invoice["currency"],
                "customer": invoice["customer"],
                "effective_at": self.now,
                "invoice": invoice["id"],
                "lines": billing_shapes.first_page(lines, f"/v1/credit_notes/{note}/lines"),
                "livemode": self.livemode,
                "number": f"{invoice['number']}-CN-{len(notes):02d}",
                "pdf": f"https://pay.stripe.com/credit_notes/acct_sandbox/{self._chance.token(40)}/pdf",
                "subtotal": amount,
                "subtotal_excluding_tax": amount,
                "total": amount,
                "total_excluding_tax": amount,
                **fields,
            }
        )
        self._store(snapshot)
        return snapshot

    def _note_line(self, invoice: Object, number: int, amount: int) -> Object:
        """Return a line: that of the invoice's line in its place, or one of its own where there is none."""
        fields: dict[str, Any] = {"id": self._chance.id("cnli"), "amount": amount, "livemode": self.livemode}
        credited = self._invoice_lines[invoice["id"]]
        if number < len(credited):
            fields |= {"invoice_line_item": credited[number]["id"], "type": "invoice_line_item"}
        else:
            fields |= {"unit_amount": amount, "unit_amount_decimal": str(amount)}
        return billing_shapes.credit_note_line(fields)

    def _lower(self, invoice: Object, pre: int, post: int) -> None:
        """Take a note's two parts into its invoice; negative ones are those of a void note."""
        changes: dict[str, Any] = {
            "post_payment_credit_notes_amount": invoice["post_payment_credit_notes_amount"] + post,
            "pre_payment_credit_notes_amount": invoice["pre_payment_credit_notes_amount"] + pre,
        }
        told = []
        if pre:
            changes["amount_due"] = invoice["amount_due"] - pre
            changes["amount_remaining"] = invoice["amount_remaining"] - pre
            if not changes["amount_remaining"]:
                changes |= self._paid(invoice)
                told.append("invoice.paid")
        self._turn(invoice, *told, **changes)

    def _paid_by(self, invoice: str) -> str:
        intents = self.invoice_intents(invoice)
        if not intents:
            raise ParameterError(f"{invoice} was paid by nothing that can be refunded")
        return intents[-1]
