"""One event of a type, for trying an endpoint by hand."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from deploy.sandbox.account import Account, Event, ParameterError


def _paid(account: Account) -> None:
    account.complete(account.open_session(shipping=500))


def _unpaid(account: Account) -> str:
    session = account.open_session()
    account.complete(session, payment_status="unpaid")
    return session


def _switched(account: Account) -> None:
    account.update_payment_link(account.create_payment_link(), active=False)


_STORIES: Final[Mapping[str, Callable[[Account], object]]] = {
    "checkout.session.completed": _paid,
    "checkout.session.async_payment_succeeded": lambda account: account.async_payment_succeeded(_unpaid(account)),
    "checkout.session.async_payment_failed": lambda account: account.async_payment_failed(_unpaid(account)),
    "checkout.session.expired": lambda account: account.expire(account.open_session(recoverable=True)),
    "payment_link.created": lambda account: account.create_payment_link(),
    "payment_link.updated": _switched,
}
"""By type, what has to happen at a shop for Stripe to send it last."""


def sample(kind: str, overrides: Mapping[str, Any], *, now: int) -> Event:
    """Return an event of the type *kind* at *now*, in Unix seconds.

    *overrides* are values of its object's keys, by dotted path.

    Raises:
        ParameterError: the sandbox knows no such type.
    """
    if kind not in _STORIES:
        raise ParameterError(f"The sandbox knows no type {kind}, but {', '.join(sorted(_STORIES))}.")
    account = Account(seed=now, start=now)
    _STORIES[kind](account)
    event = account.events[-1]
    if not overrides:
        return event
    about = event.payload()["data"]["object"]
    for path, value in overrides.items():
        holder = about
        *parents, key = path.split(".")
        for parent in parents:
            holder = holder.setdefault(parent, {})
        holder[key] = value
    return account.emit(kind, about)
