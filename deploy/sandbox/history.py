"""Seeded histories: whole shops, and small tangles for property tests.

A history is an account after the fact: its ``events`` in true order, and the true status of every session.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from typing import Final

from deploy.sandbox import lives
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
_VISIT_SECONDS_MEAN: Final = 4.0
_VISITS_PER_LINK_CHANGE: Final = 150

# The kinds of visits to a shop, each with its weight.
_VISITS: Final = {"cart": 50, "link": 41, "setup": 3, "subscription": 3, "nothing due": 3}
_DECISIONS: Final = {"pay": 72, "leave": 16, "pay by a delayed method": 10, "called off": 2}
_CLEARINGS: Final = {"clears": 78, "fails": 17, "clears at once": 5}

_MONTH_SECONDS: Final = 30 * DAY_SECONDS
# The events after a sale, each with its weight; and the other work of an office.
_FATES: Final = {"nothing": 89, "refunds": 9, "dispute": 2}
_OFFICE: Final = (lives.invoice, lives.invoice, lives.invoice, lives.balance, lives.portal, lives.deletion)

TANGLE_EVENTS_MIN: Final = 3
TANGLE_EVENTS_MAX: Final = 12
_BURST_MAX: Final = 5
MONEY_EVENTS_BEGUN_MAX: Final = 24
"""How many events a tangle of money has before its last step."""
_OVER: Final = object()


def shop_history(
    seed: int,
    orders: int,
    *,
    livemode: bool = False,
    account: str | None = None,
    start: int = START,
    money: bool = False,
) -> Account:
    """Return a shop that *orders* buyers visited, each opening a session; a recovered one opens another.

    All visits have come to their end but the last hundredth, which are open or processing. For 100,000 orders and
    more, :func:`stream_shop` needs less memory. With *money* the shop also has the objects that come after a sale:
    customers and their balances, invoices, credit notes, refunds, disputes and the billing portal.
    """
    shop = Account(seed=seed, livemode=livemode, account=account, start=start, payments=money)
    for _ in _shop(shop, seed, orders).run():
        pass
    return shop


def stream_shop(shop: Account, seed: int, orders: int) -> Iterator[Event]:
    """Yield the events of :func:`shop_history` as they happen at *shop*, a new account, which keeps none.

    A shop that makes payments (``Account(payments=True)``) has all objects that come after a sale.
    """
    for _ in _shop(shop, seed, orders).run():
        yield from shop.take_events()


def _flip(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability


def _pick(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


class _Shop:
    """Drives an account through time, by an agenda of steps and their times that begins with visits."""

    def __init__(self, account: Account, seed: int, orders: int) -> None:
        self._account = account
        self._random = random.Random(f"shop {seed}")
        self._last_visits = orders // 100
        self._visits_left = orders - self._last_visits
        self._visits = 0
        self._agenda: list[tuple[int, int, Callable[[str], object], str]] = []
        self._entries = 0
        # The price of each link, and the links that are switched on.
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
        for number in range(self._last_visits):
            session = self._buy_in_cart()
            if number % 2:
                self._account.complete(session, payment_status="unpaid")
            yield

    def _pass_time(self, until: int) -> None:
        self._account.advance(max(0, until - self._account.now))

    def _after(self, seconds: float, happen: Callable[[str], object], object_id: str) -> None:
        self._entries += 1  # keeps steps of one second in the order in which they were decided
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
        self._next_visit += self._random.expovariate(1 / _VISIT_SECONDS_MEAN)
        if self._visits % _VISITS_PER_LINK_CHANGE == 0:
            self._change_links()
        match _pick(self._random, _VISITS):
            case "setup":
                session = self._account.open_session(mode="setup", customer=self._customer())
                self._after(self._hesitation(), self._pay, session)
            case "subscription":
                amount = 0 if _flip(self._random, 0.3) else 1_200  # a trial owes nothing
                session = self._account.open_session(mode="subscription", amount=amount)
                self._after(self._hesitation(), self._pay, session)
            case "nothing due":
                session = self._account.open_session(amount=2_000, discount=2_000, metadata={"code": "FREE"})
                self._after(self._hesitation(), self._pay, session)
            case "link":
                self._decide(self._buy_by_link())
            case _:
                self._decide(self._buy_in_cart())

    def _change_links(self) -> None:
        """Switch a link off and on again, with a note of it, often within one second."""
        link = self._random.choice(list(self._links))
        switched_off = link in self._active and len(self._active) > 1
        if switched_off:
            self._account.update_payment_link(link, active=False)
            self._active.remove(link)
        self._account.update_payment_link(link, metadata={"changed": str(self._visits)})
        if not switched_off or _flip(self._random, 0.5):
            self._switch_on(link)
        else:
            self._after(self._random.uniform(0, 900), self._switch_on, link)

    def _switch_on(self, link: str) -> None:
        self._account.update_payment_link(link, active=True, metadata={"changed": None})
        if link not in self._active:
            self._active.append(link)

    def _buy_by_link(self) -> str:
        """Open a session of a payment link; one in ten buyers brings a reference from the url's query."""
        link = self._random.choice(self._active)
        reference = f"mail-{self._visits}" if _flip(self._random, 0.1) else None
        abroad = _flip(self._random, 0.05)
        presentment = ("sek", self._links[link] * 11) if abroad else None
        return self._account.open_session(payment_link=link, client_reference_id=reference, presentment=presentment)

    def _buy_in_cart(self) -> str:
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
            recoverable=_flip(self._random, 0.3),
            invoice_creation=self._wants_invoice(),
        )

    def _decide(self, session: str) -> None:
        """Let a buyer pay at once or by a delayed method, or leave the page."""
        match _pick(self._random, _DECISIONS):
            case "pay":
                self._after(self._hesitation(), self._pay, session)
            case "pay by a delayed method":
                self._after(self._hesitation(), self._pay_delayed, session)
            case "called off":
                self._after(self._random.uniform(60, 7_200), self._account.expire, session)
            case _:
                self._after(DAY_SECONDS + self._random.uniform(0, 60), self._leave, session)

    def _pay(self, session: str) -> None:
        self._account.complete(session)

    def _clear(self, session: str) -> None:
        self._account.async_payment_succeeded(session)

    def _pay_delayed(self, session: str) -> None:
        self._account.complete(session, payment_status="unpaid")
        seconds = self._random.uniform(60, 5 * DAY_SECONDS)
        match _pick(self._random, _CLEARINGS):
            case "clears at once":
                self._clear(session)
            case "clears":
                self._after(seconds, self._clear, session)
            case _:
                self._after(seconds, self._account.async_payment_failed, session)

    def _leave(self, session: str) -> None:
        self._account.expire(session)
        recoverable = self._account.session(session)["after_expiration"] is not None
        if recoverable and _flip(self._random, 0.4):
            self._after(self._random.uniform(600, 3 * DAY_SECONDS), self._come_back, session)

    def _come_back(self, session: str) -> None:
        self._decide(self._account.recover(session))

    def _hesitation(self) -> float:
        """Return how long a buyer takes for the page, in seconds: some no time, most minutes, a few hours."""
        return min(self._random.expovariate(1 / 240), DAY_SECONDS - 60)

    def _customer(self) -> str:
        return f"cus_{self._random.getrandbits(56):014x}"

    def _wants_invoice(self) -> bool:
        return False


class _MoneyShop(_Shop):
    """A shop that also has the objects after a sale, and an office that writes invoices."""

    def __init__(self, account: Account, seed: int, orders: int) -> None:
        super().__init__(account, seed, orders)
        self._customers: list[str] = []
        self._living: dict[str, lives.Life] = {}

    def _visit(self) -> None:
        super()._visit()
        if _flip(self._random, 0.06):
            self._begin(self._random.choice(_OFFICE)(self._account, self._random))

    def _pay(self, session: str) -> None:
        super()._pay(session)
        self._sold(session)

    def _clear(self, session: str) -> None:
        super()._clear(session)
        self._sold(session)

    def _sold(self, session: str) -> None:
        """Decide what follows a sale: most often nothing."""
        current = self._account.session(session)
        paid = bool(self._account.order_intents(session))
        fate = _pick(self._random, _FATES)
        if current["subscription"] is not None and _flip(self._random, 0.5):
            self._after(_MONTH_SECONDS, self._renew, current["subscription"])
        if current["invoice"] is not None and paid and fate != "nothing":
            self._begin(lives.notes(self._account, self._random, current["invoice"]))
        elif paid and fate == "refunds":
            self._begin(lives.refunds(self._account, self._random, session))
        elif paid and fate == "dispute":
            self._begin(lives.dispute(self._account, self._random, session))

    def _renew(self, subscription: str) -> None:
        """Bill a subscription for its month, and some of them for another one."""
        invoice = self._account.renew(subscription, 1_200)
        self._account.finalize_invoice(invoice)
        if self._account.object("invoice", invoice)["status"] == "open":  # a balance may have paid it
            self._account.pay_invoice(invoice)
        if _flip(self._random, 0.3):
            self._after(_MONTH_SECONDS, self._renew, subscription)

    def _begin(self, life: lives.Life) -> None:
        name = f"life {self._entries}"
        self._living[name] = life
        self._after(self._random.expovariate(1 / (2 * DAY_SECONDS)), self._go_on, name)

    def _go_on(self, name: str) -> None:
        if next(self._living[name], _OVER) is _OVER:
            del self._living[name]
        else:
            self._after(self._random.expovariate(1 / DAY_SECONDS), self._go_on, name)

    def _customer(self) -> str:
        """Return a buyer who has an account at the shop, half of them for the first time."""
        if self._customers and _flip(self._random, 0.5):
            return self._random.choice(self._customers)
        customer = self._account.create_customer(email=f"buyer-{len(self._customers)}@example.com")
        self._customers.append(customer)
        return customer

    def _wants_invoice(self) -> bool:
        return _flip(self._random, 0.15)


def _shop(account: Account, seed: int, orders: int) -> _Shop:
    return (_MoneyShop if account.payments else _Shop)(account, seed, orders)


def tangle(seed: int, *, contradictory: bool | None = None, money: bool = False) -> Account:
    """Return a small account: 1 to 4 links and sessions, 3 to 12 events, most of them within the same seconds.

    The links change 2 to 5 times within one second. A *contradictory* tangle (by default one in eight) also has an
    event that a session expired, although the session completes; its true status is the completed one. With *money*
    there are all other objects too, and up to 60 events, since one payment has many.
    """
    rng = random.Random(f"tangle {seed}")
    account = Account(seed=seed, payments=money)
    if contradictory is None:
        contradictory = _flip(rng, 0.125)
    contradiction = _contradiction(account, rng) if contradictory else iter(())
    kinds = (_link, _delayed, _expired, *lives.BEGINNINGS) if money else _LIVES
    living = [rng.choice(kinds)(account, rng) for _ in range(rng.randint(1, 4 - contradictory))]
    living.append(contradiction)
    # Room is kept for a burst in the last step, and for a contradiction that has not begun.
    events_max = MONEY_EVENTS_BEGUN_MAX if money else TANGLE_EVENTS_MAX - _BURST_MAX - (2 if contradictory else 0)
    while living and len(account.events) <= events_max:
        life = rng.choice(living)
        if next(life, _OVER) is _OVER:
            living.remove(life)
        account.advance(rng.choice((0, 0, 0, 0, 0, 1, 1, 30, 600)))
    for _ in contradiction:
        pass
    if len(account.events) < TANGLE_EVENTS_MIN:
        _burst(account, rng, account.create_payment_link())
    return account


def _link(account: Account, rng: random.Random) -> lives.Life:
    link = account.create_payment_link(metadata={"note": "first"} if _flip(rng, 0.5) else None)
    yield
    for _ in range(rng.randint(1, 2)):
        _burst(account, rng, link)
        yield


def _burst(account: Account, rng: random.Random, link: str) -> None:
    """Change a link 2 to 5 times within one second, sometimes back to what it was."""
    wanted = len(account.events) + rng.randint(2, _BURST_MAX)
    while len(account.events) < wanted:
        if _flip(rng, 0.5):
            account.update_payment_link(link, active=not account.payment_link(link)["active"])
        else:
            note, text = rng.choice(("note", "season")), rng.choice((None, "first", "second"))
            account.update_payment_link(link, metadata={note: text})


def _open(account: Account, rng: random.Random, *, recoverable: bool = False) -> str:
    """Open a session, of a link where one is active."""
    links = [link for link in account.payment_link_ids() if account.payment_link(link)["active"]]
    link = rng.choice(links) if links and _flip(rng, 0.5) else None
    return account.open_session(payment_link=link, tax=rng.choice((0, 380)), recoverable=recoverable)


def _paid(account: Account, rng: random.Random) -> lives.Life:
    session = _open(account, rng)
    yield
    account.complete(session)


def _delayed(account: Account, rng: random.Random) -> lives.Life:
    session = _open(account, rng)
    yield
    account.complete(session, payment_status="unpaid")
    yield
    if _flip(rng, 0.5):
        account.async_payment_succeeded(session)
    else:
        account.async_payment_failed(session)


def _nothing_due(account: Account, rng: random.Random) -> lives.Life:
    setup = _flip(rng, 0.5)
    session = account.open_session(mode="setup") if setup else account.open_session(amount=0)
    yield
    account.complete(session)


def _expired(account: Account, rng: random.Random) -> lives.Life:
    session = _open(account, rng)
    yield
    account.expire(session)


def _recovered(account: Account, rng: random.Random) -> lives.Life:
    original = _open(account, rng, recoverable=True)
    yield
    account.expire(original)
    yield
    again = account.recover(original)
    yield
    if _flip(rng, 0.7):
        account.complete(again)
    else:
        account.expire(again)


def _contradiction(account: Account, rng: random.Random) -> lives.Life:
    """Emit an expired and a completed event of one session, in either order."""
    session = account.open_session()
    expired = account.session(session) | {"status": "expired", "url": None}
    expired_first = _flip(rng, 0.5)
    yield
    if expired_first:
        account.emit("checkout.session.expired", expired)
        yield
    account.complete(session, payment_status=rng.choice(("paid", "unpaid")))
    if not expired_first:
        yield
        account.emit("checkout.session.expired", expired)


# Links are the nastiest, since their order is in previous_attributes alone.
_LIVES: Final[tuple[Callable[[Account, random.Random], lives.Life], ...]] = (
    _link,
    _link,
    _link,
    _paid,
    _delayed,
    _delayed,
    _nothing_due,
    _expired,
    _recovered,
)
