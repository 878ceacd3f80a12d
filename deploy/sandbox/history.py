"""Seeded histories: whole shops, and small tangles for property tests.

A history is an account after the fact: its ``events`` in true order, and the true status of every session.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from typing import Final

from deploy.sandbox.account import DAY_SECONDS, START, Account, Event

# Currency, and a usual price in its smallest unit: without decimals, with two, and with three, where the last
# digit is always 0.
_PRICES: Final = (
    ("usd", 2_000),
    ("eur", 1_900),
    ("gbp", 1_500),
    ("jpy", 3_000),
    ("krw", 28_000),
    ("kwd", 6_150),
    ("huf", 790_000),
)
_USUAL_CURRENCIES: Final = (70, 15, 6, 4, 1, 2, 2)
_ORDER_SECONDS_MEAN: Final = 4.0
_VISITS_PER_LINK_CHANGE: Final = 150

TANGLE_EVENTS_MIN: Final = 3
TANGLE_EVENTS_MAX: Final = 12
_BURST_MAX: Final = 5


def shop_history(
    seed: int, orders: int, *, livemode: bool = False, account: str | None = None, start: int = START
) -> Account:
    """Return a shop that *orders* buyers visited, after the last payment has cleared and the last cart expired.

    Each visit opens one session, and an expired one that is recovered opens another. A few buyers of the last
    day are still on the page. For 100,000 orders and more, :func:`stream_shop` needs less memory.
    """
    shop = Account(seed=seed, livemode=livemode, account=account, start=start)
    for _ in _Shop(shop, seed, orders).run():
        pass
    return shop


def stream_shop(shop: Account, seed: int, orders: int) -> Iterator[Event]:
    """Yield the events of :func:`shop_history` as they happen at *shop*, a new account, which keeps none."""
    for _ in _Shop(shop, seed, orders).run():
        yield from shop.take_events()


class _Shop:
    """Drives an account through time: an agenda of what is to happen when, begun by visits."""

    def __init__(self, account: Account, seed: int, orders: int) -> None:
        self._account = account
        self._random = random.Random(f"shop {seed}")
        self._visits_left = orders
        self._visits = 0
        self._agenda: list[tuple[int, int, Callable[[str], object], str]] = []
        self._entries = 0
        # Currency and price of each link, and the links that are switched on.
        self._links: dict[str, int] = {}
        self._active: list[str] = []
        # Sales follow each other by a random time; this is when the next one falls.
        self._next_visit = float(account.now)

    def run(self) -> Iterator[None]:
        """Let things happen one after the other until nothing is left to do, yielding after each."""
        self._open_shop()
        yield
        while self._agenda or self._visits_left:
            if self._visits_left and (not self._agenda or self._next_visit <= self._agenda[0][0]):
                self._pass_time(int(self._next_visit))
                self._visit()
            else:
                due, _, happen, object_id = heapq.heappop(self._agenda)
                self._pass_time(due)
                happen(object_id)
            yield

    def _pass_time(self, until: int) -> None:
        self._account.advance(max(0, until - self._account.now))

    def _after(self, seconds: float, happen: Callable[[str], object], object_id: str) -> None:
        self._entries += 1  # keeps things of one second in the order in which they were decided
        entry = (self._account.now + int(seconds), self._entries, happen, object_id)
        heapq.heappush(self._agenda, entry)

    def _open_shop(self) -> None:
        for number, (currency, price) in enumerate(_PRICES[:5]):
            metadata = {"campaign": f"autumn-{number}"}
            link = self._account.create_payment_link(currency=currency, amount=price, metadata=metadata)
            self._links[link] = price
            self._active.append(link)

    def _visit(self) -> None:
        self._visits_left -= 1
        self._visits += 1
        self._next_visit += self._random.expovariate(1 / _ORDER_SECONDS_MEAN)
        if self._visits % _VISITS_PER_LINK_CHANGE == 0:
            self._change_links()
        share = self._random.random()
        if share < 0.03:
            session = self._account.open_session(mode="setup", customer=self._customer())
            self._after(self._hesitation(), self._account.complete, session)
        elif share < 0.06:
            self._subscribe()
        elif share < 0.09:
            session = self._account.open_session(amount=2_000, discount=2_000, metadata={"code": "FREE"})
            self._after(self._hesitation(), self._account.complete, session)
        else:
            recoverable = self._random.random() < 0.3
            self._decide(self._buy_by_link() if share < 0.5 else self._buy_in_cart(recoverable=recoverable))

    def _change_links(self) -> None:
        """Switch a link off and often on again, with a note of it, at times within one second."""
        link = self._random.choice(list(self._links))
        switched_off = link in self._active and len(self._active) > 1
        if switched_off:
            self._account.update_payment_link(link, active=False)
            self._active.remove(link)
        self._account.update_payment_link(link, metadata={"changed": str(self._visits)})
        if not switched_off or self._random.random() < 0.5:
            self._switch_on(link)
        else:
            self._after(self._random.uniform(0, 900), self._switch_on, link)

    def _switch_on(self, link: str) -> None:
        self._account.update_payment_link(link, active=True, metadata={"changed": None})
        if link not in self._active:
            self._active.append(link)

    def _subscribe(self) -> None:
        trial = self._random.random() < 0.3
        session = self._account.open_session(mode="subscription", amount=0 if trial else 1_200)
        self._after(self._hesitation(), self._account.complete, session)

    def _buy_by_link(self) -> str:
        """Open a session of a payment link; one in ten buyers brings a reference from the url's query."""
        link = self._random.choice(self._active)
        reference = f"mail-{self._visits}" if self._random.random() < 0.1 else None
        abroad = self._random.random() < 0.05
        presentment = ("sek", self._links[link] * 11) if abroad else None
        return self._account.open_session(
            payment_link=link, client_reference_id=reference, presentment=presentment
        )

    def _buy_in_cart(self, *, recoverable: bool) -> str:
        """Open a session of the shop's own cart, with the extras of one."""
        currency, price = self._random.choices(_PRICES, _USUAL_CURRENCIES)[0]
        amount = price * self._random.randint(1, 5)
        extras = self._random.getrandbits(4)
        return self._account.open_session(
            amount=amount,
            currency=currency,
            client_reference_id=f"cart-{self._visits}",
            customer=self._customer() if extras & 1 else None,
            metadata={"cart": str(self._visits)},
            discount=amount // 100 * 10 if extras & 2 else 0,
            shipping=price // 100 * 20 if extras & 4 else 0,
            tax=amount // 100 * 10 if extras & 8 else 0,
            recoverable=recoverable,
        )

    def _decide(self, session: str) -> None:
        """Let a buyer pay at once (most), pay by a delayed method, stay on the page, or leave."""
        share = self._random.random()
        if share < 0.72:
            self._after(self._hesitation(), self._account.complete, session)
        elif share < 0.82:
            self._after(self._hesitation(), self._pay_delayed, session)
        elif share < 0.84:
            self._after(self._random.uniform(60, 7_200), self._account.expire, session)  # called by the shop
        elif share < 0.99 or self._visits_left > 0:
            self._after(DAY_SECONDS + self._random.uniform(0, 60), self._leave, session)

    def _pay_delayed(self, session: str) -> None:
        self._account.complete(session, payment_status="unpaid")
        share = self._random.random()
        if share < 0.8:
            # At times within the same second.
            wait = 0 if share < 0.05 else self._random.uniform(60, 5 * DAY_SECONDS)
            self._after(wait, self._account.async_payment_succeeded, session)
        elif share < 0.97:
            self._after(
                self._random.uniform(60, 5 * DAY_SECONDS), self._account.async_payment_failed, session
            )

    def _leave(self, session: str) -> None:
        self._account.expire(session)
        if self._account.is_recoverable(session) and self._random.random() < 0.4:
            self._after(self._random.uniform(600, 3 * DAY_SECONDS), self._come_back, session)

    def _come_back(self, session: str) -> None:
        self._decide(self._account.recover(session))

    def _hesitation(self) -> float:
        """Return how long a buyer takes for the page, in seconds: some no time, most minutes, a few hours."""
        return min(self._random.expovariate(1 / 240), DAY_SECONDS - 60)

    def _customer(self) -> str:
        return f"cus_{self._random.getrandbits(56):014x}"


def tangle(seed: int, *, contradictory: bool | None = None) -> Account:
    """Return a small account: 1 to 4 links and sessions, 3 to 12 events, most of them within the same seconds.

    The links change 2 to 5 times within one second. A *contradictory* tangle (by default one in eight) also has
    an event that says expired of a session that was completed; that session's true status is the completed one.
    """
    rng = random.Random(f"tangle {seed}")
    if contradictory is None:
        contradictory = rng.random() < 0.125
    account = Account(seed=seed)
    lives = [rng.choice(_LIVES)(account, rng) for _ in range(rng.randint(1, 4))]
    if contradictory:
        lives[0] = _contradicted_session(account, rng)
    # A step emits at most a burst, so that the last one ends within the maximum.
    while lives and len(account.events) <= TANGLE_EVENTS_MAX - _BURST_MAX - 1:
        life = lives[0] if contradictory and rng.random() < 0.5 else rng.choice(lives)
        if next(life, None) is None:
            lives.remove(life)
            contradictory = contradictory and any(life is other for other in lives[:1])
        account.advance(rng.choice((0, 0, 0, 0, 0, 1, 1, 30, 600)))
    while len(account.events) < TANGLE_EVENTS_MIN:
        next(_link(account, rng))
    return account


# A life is one object's way through its states; it yields after each step.
Life = Iterator[bool]


def _link(account: Account, rng: random.Random) -> Life:
    link = account.create_payment_link(metadata={"note": "first"} if rng.random() < 0.5 else None)
    yield True
    for _ in range(rng.randint(1, 2)):
        _burst(account, rng, link)
        yield True


def _burst(account: Account, rng: random.Random, link: str) -> None:
    """Change a link 2 to 5 times within one second, at times back to what it was."""
    wanted = len(account.events) + rng.randint(2, _BURST_MAX)
    while len(account.events) < wanted:
        notes = {rng.choice(("note", "season")): rng.choice((None, "first", "second"))}
        if rng.random() < 0.5:
            account.update_payment_link(link, active=not account.payment_link(link)["active"])
        else:
            account.update_payment_link(link, metadata=notes)
