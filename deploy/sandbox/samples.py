"""One event of a type, for trying an endpoint by hand."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from deploy.sandbox.account import Account, Event, ParameterError


def _paid(account: Account) -> str:
    """Return a session that has been paid."""
    session = account.open_session(shipping=500)
    account.complete(session)
    return session


def _unpaid(account: Account) -> str:
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    return session


def _switched(account: Account) -> None:
    account.update_payment_link(account.create_payment_link(), active=False)


def _customer(account: Account) -> str:
    return account.create_customer(email="buyer@example.com", name="Zoë Ważka")


def _draft(account: Account) -> str:
    return account.create_invoice(_customer(account), 3_000, tax=300)


def _open(account: Account) -> str:
    invoice = _draft(account)
    account.finalize_invoice(invoice)
    return invoice


def _paid_invoice(account: Account) -> str:
    invoice = _open(account)
    account.pay_invoice(invoice)
    return invoice


def _credited(account: Account) -> str:
    """Return a credit note that goes to all three destinations."""
    return account.issue_credit_note(_paid_invoice(account), 1_000, refund=500, credit=300, out_of_band=200)


def _intent(account: Account) -> str:
    """Return the payment intent of a session paid by card."""
    return str(account.session(_paid(account))["payment_intent"])


def _debited(account: Account) -> str:
    """Return the payment intent of a session paid from a bank account."""
    session = _unpaid(account)
    account.async_payment_succeeded(session)
    return str(account.session(session)["payment_intent"])


def _closed(account: Account) -> None:
    account.close_dispute(account.open_dispute(_intent(account)), "won")


def _bounced(account: Account) -> None:
    account.async_payment_failed(_unpaid(account))


_STORIES: Final[Mapping[str, Callable[[Account], object]]] = {
    "billing_portal.configuration.created": lambda account: account.create_portal_configuration(name="Sandbox"),
    "billing_portal.configuration.updated": lambda account: account.update_portal_configuration(
        account.create_portal_configuration(), login_page=True
    ),
    "billing_portal.session.created": lambda account: account.create_portal_session(_customer(account)),
    "charge.dispute.closed": _closed,
    "charge.dispute.created": lambda account: account.open_dispute(_intent(account)),
    "charge.dispute.funds_reinstated": _closed,
    "charge.dispute.funds_withdrawn": lambda account: account.open_dispute(_intent(account)),
    "charge.dispute.updated": lambda account: account.submit_evidence(account.open_dispute(_intent(account))),
    "charge.failed": _bounced,
    "charge.pending": _unpaid,
    "charge.refund.updated": lambda account: account.succeed_refund(account.refund(_debited(account))),
    "charge.refunded": lambda account: account.refund(_intent(account), 500),
    "charge.succeeded": _paid,
    "charge.updated": lambda account: account.open_dispute(_intent(account)),
    "checkout.session.async_payment_failed": lambda account: account.async_payment_failed(_unpaid(account)),
    "checkout.session.async_payment_succeeded": lambda account: account.async_payment_succeeded(_unpaid(account)),
    "checkout.session.completed": _paid,
    "checkout.session.expired": lambda account: account.expire(account.open_session(recoverable=True)),
    "credit_note.created": _credited,
    "credit_note.updated": lambda account: account.update_credit_note(_credited(account), memo="Sorry."),
    "credit_note.voided": lambda account: account.void_credit_note(account.issue_credit_note(_open(account), 1_000)),
    "customer.created": _customer,
    "customer.deleted": lambda account: account.delete_customer(_customer(account)),
    "customer.updated": lambda account: account.adjust_balance(_customer(account), -500),
    "invoice.created": _draft,
    "invoice.deleted": lambda account: account.delete_invoice(_draft(account)),
    "invoice.finalized": _open,
    "invoice.marked_uncollectible": lambda account: account.mark_uncollectible(_open(account)),
    "invoice.paid": _paid_invoice,
    "invoice.payment_failed": lambda account: account.fail_invoice_payment(_open(account)),
    "invoice.payment_succeeded": _paid_invoice,
    "invoice.updated": lambda account: account.update_invoice(_draft(account), metadata={"order": "7"}),
    "invoice.voided": lambda account: account.void_invoice(_open(account)),
    "invoice_payment.paid": _paid_invoice,
    "payment_intent.payment_failed": _bounced,
    "payment_intent.processing": _unpaid,
    "payment_intent.succeeded": _paid,
    "payment_link.created": lambda account: account.create_payment_link(),
    "payment_link.updated": _switched,
    "refund.created": lambda account: account.refund(_intent(account), 500),
    "refund.failed": lambda account: account.fail_refund(account.refund(_intent(account))),
    "refund.updated": lambda account: account.fail_refund(account.refund(_intent(account))),
}
"""By type, the steps at a shop after which Stripe sends an event of it."""


def sample(kind: str, overrides: Mapping[str, Any], *, now: int) -> Event:
    """Return an event of the type *kind* at *now*, in Unix seconds.

    *overrides* are values of its object's keys, by dotted path.

    Raises:
        ParameterError: the sandbox knows no such type.
    """
    if kind not in _STORIES:
        raise ParameterError(f"The sandbox knows no type {kind}, but {', '.join(sorted(_STORIES))}.")
    # An order's money has events of its own only where the type is about money.
    account = Account(seed=now, start=now, payments=not kind.startswith("checkout."))
    _STORIES[kind](account)
    event = [event for event in account.events if event.type == kind][-1]
    if not overrides:
        return event
    data = event.payload()["data"]
    about = data["object"]
    for path, value in overrides.items():
        holder = about
        *parents, key = path.split(".")
        for parent in parents:
            holder = holder.setdefault(parent, {})
            if not isinstance(holder, dict):
                raise ParameterError(f"{parent} of {path} is no object that has keys.")
        holder[key] = value
    return account.emit(kind, about, data.get("previous_attributes"))
