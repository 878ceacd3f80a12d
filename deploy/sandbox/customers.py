"""Customers and their credit balance.

Each change of a balance is a row of the customer's ledger in one currency. Stripe sends no event of the row. It sends
one of the customer, and only for the default currency, which is the only one that the customer shows.
See https://docs.stripe.com/billing/customer/balance.
"""

from collections.abc import Mapping
from typing import Any

from deploy.sandbox import billing_shapes
from deploy.sandbox.journal import (
    Journal,
    Object,
    ParameterError,
    TransitionError,
    api_call,
    copy_of,
    merged_metadata,
    previous_attributes,
)

DEFAULT_CURRENCY = "usd"
UPDATABLE = ("email", "name", "phone", "description", "address")


class Customers(Journal):
    """Customers, and a ledger per customer and currency."""

    def __init__(self, **parameters: Any) -> None:  # noqa: ANN401 (those of Journal)
        super().__init__(**parameters)
        # By customer, the rows of all currencies, oldest first.
        self._ledgers: dict[str, list[Object]] = {}

    @api_call
    def create_customer(
        self,
        *,
        email: str | None = None,
        name: str | None = None,
        currency: str | None = None,
        balance: int = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Create a customer and return its id. Without *currency* the first money decides it.

        *balance* is in minor units, negative if the shop owes the customer.
        """
        return self._new_customer(email, name, currency=currency, balance=balance, metadata=metadata)

    def _new_customer(
        self,
        email: str | None,
        name: str | None,
        *,
        currency: str | None = None,
        balance: int = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        customer = self._chance.short_id("cus")
        if balance:
            currency = currency or DEFAULT_CURRENCY
        snapshot = billing_shapes.customer(
            {
                "id": customer,
                "balance": balance,
                "created": self.now,
                "currency": currency,
                "email": email,
                "invoice_prefix": self._chance.token(8).upper(),
                "livemode": self.livemode,
                "metadata": dict(metadata or {}),
                "name": name,
            }
        )
        self._store(snapshot)
        self._ledgers[customer] = []
        if balance:
            self._append(customer, "initial", balance, currency or DEFAULT_CURRENCY)
        self._emit("customer.created", snapshot)
        return customer

    @api_call
    def update_customer(
        self,
        customer: str,
        /,
        *,
        metadata: Mapping[str, str | None] | None = None,
        **fields: Any,  # noqa: ANN401 (JSON values)
    ) -> None:
        """Change a customer's email, name, phone, description or address; metadata is merged.

        An update that changes nothing has no event.
        """
        if fields.keys() - set(UPDATABLE):
            raise ParameterError(f"Received unknown parameters: {', '.join(sorted(fields.keys() - set(UPDATABLE)))}")
        before = self._customer(customer)
        if metadata is not None:
            fields["metadata"] = merged_metadata(before["metadata"], metadata)
        after, previous = self._change(before, **fields)
        if previous:
            self._emit("customer.updated", after, previous)

    @api_call
    def delete_customer(self, customer: str) -> None:
        """Delete a customer. The event carries it whole, and the API only a tombstone from now on."""
        self._emit("customer.deleted", self._customer(customer))
        self._store({"id": customer, "object": "customer", "deleted": True})

    @api_call
    def adjust_balance(
        self, customer: str, amount: int, *, currency: str | None = None, description: str | None = None
    ) -> str:
        """Add *amount* minor units (negative: credit to the customer) to a balance, and return the transaction.

        *currency* is the customer's own by default.
        """
        if not amount:
            raise ParameterError("amount must not be 0")
        currency = currency or self._customer(customer)["currency"] or DEFAULT_CURRENCY
        return self._post(customer, "adjustment", amount, currency, description=description)

    def balance_transactions(self, customer: str) -> list[Object]:
        """Return a customer's ledger in all currencies, newest first, as the API lists it."""
        return [copy_of(row) for row in reversed(self._ledgers[customer])]

    def expected_balance(self, customer: str, currency: str) -> int:
        """Return the balance a customer really has in minor units, negative for credit; 0 in a currency never used."""
        rows = [row for row in self._ledgers[customer] if row["currency"] == currency]
        return int(rows[-1]["ending_balance"]) if rows else 0

    def _customer(self, customer: str) -> Object:
        current = self._find("customer", customer)
        if current.get("deleted"):
            raise TransitionError(f"{customer} is deleted")
        return current

    def _post(self, customer: str, kind: str, amount: int, currency: str, **links: str | None) -> str:
        """Add a row to the ledger, and emit an event if it is in the default currency."""
        before = self._customer(customer)
        row = self._append(customer, kind, amount, currency, **links)
        changes: dict[str, Any] = {}
        if before["currency"] is None:
            changes["currency"] = currency
        if before["currency"] in {None, currency}:
            changes["balance"] = row["ending_balance"]
        if changes:
            after, previous = self._change(before, **changes)
            self._emit("customer.updated", after, previous)
        return str(row["id"])

    def _append(self, customer: str, kind: str, amount: int, currency: str, **links: str | None) -> Object:
        row = billing_shapes.customer_balance_transaction(
            {
                "id": self._chance.id("cbtxn"),
                "amount": amount,
                "created": self.now,
                "currency": currency,
                "customer": customer,
                "ending_balance": self.expected_balance(customer, currency) + amount,
                "livemode": self.livemode,
                "type": kind,
                **links,
            }
        )
        self._ledgers[customer].append(row)
        self._store(row)
        return row

    def _settle_currency(self, customer: str, currency: str) -> None:
        """Give a customer its default currency, which its first invoice decides."""
        before = self._customer(customer)
        if before["currency"] is None:
            after = before | {"currency": currency}
            self._store(after)
            self._emit("customer.updated", after, previous_attributes(before, after))
