"""The demo's shop: a history that ends just now, carts that buyers left behind, and a Stripe that answers for them."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from deploy.sandbox.account import START, Account, Event
from deploy.sandbox.history import shop_history
from deploy.sandbox.http_api import StripeApi
from deploy.sandbox.server import serving

ACCOUNT: Final = "acct_demo"
KEY: Final = "sk_test_demo"
CARTS_PER_ORDERS: Final = 50
"""One cart is left behind for this many orders, and at least five in all."""
CARTS_MIN: Final = 5
LEFT_SECONDS: Final = 2 * 3600
"""The buyers left this long ago: longer than a session may stay open by default."""
YOUNG_SECONDS: Final = 600
YOUNG_CARTS: Final = 3


@dataclass(frozen=True, slots=True)
class SandboxShop:
    """A shop with its Stripe: *left* are the carts that buyers left, *young* those they may still be looking at."""

    account: Account
    stripe: StripeApi
    address: str
    left: list[str]
    young: list[str]

    @property
    def environment(self) -> dict[str, str]:
        """The settings by which Payfold acts at this Stripe, and every second, so that a demo does not take long."""
        return {
            "STRIPE_API_KEY": f"{ACCOUNT}={KEY}",
            "STRIPE_API_BASE": self.address,
            "PAYFOLD_STRIPE_CALLS_PER_SECOND": "1000",
            "PAYFOLD_EXPIRE_SECONDS": "1",
            "PAYFOLD_POLL_SECONDS": "1",
            "PAYFOLD_FETCH_SECONDS": "1",
        }

    def recover(self, sessions: Collection[str]) -> list[Event]:
        """Let the buyers of expired *sessions* follow their recovery urls and pay, and return all of the events."""
        with self.stripe.lock:
            for session in sessions:
                self.account.complete(self.account.recover(session))
            return list(self.account.events)


@contextmanager
def open_shop(seed: int, orders: int) -> Iterator[SandboxShop]:
    """Sell to *orders* buyers, leave carts behind, and serve Stripe's API of it all until the block ends."""
    # How long a history takes follows from its seed, and it is to end just now.
    span = _sold(seed, orders, start=START).now - START
    account = _sold(seed, orders, start=int(time.time()) - LEFT_SECONDS - span)
    left = [session for session in account.session_ids() if account.expected_status(session) == "open"]
    left += [_leave_cart(account, number) for number in range(max(CARTS_MIN, orders // CARTS_PER_ORDERS))]
    account.advance(LEFT_SECONDS - YOUNG_SECONDS)
    young = [_leave_cart(account, len(left) + number) for number in range(YOUNG_CARTS)]
    stripe = StripeApi({KEY: account}, clock=lambda: int(time.time()))
    with serving(stripe) as address:
        yield SandboxShop(account, stripe, address, left, young)


def _sold(seed: int, orders: int, *, start: int) -> Account:
    return shop_history(seed, orders, account=ACCOUNT, start=start, money=True)


def _leave_cart(account: Account, number: int) -> str:
    return account.open_session(
        amount=2_500, client_reference_id=f"left-{number}", metadata={"cart": f"left-{number}"}, recoverable=True
    )
