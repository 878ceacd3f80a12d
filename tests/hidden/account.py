"""A simulated Stripe account, independent of the sandbox: it keeps objects, changes them, and reports them by events.

Written from Stripe's documentation alone (docs.stripe.com/api, summed up in stripe-facts): nothing here knows what a
fold reads, and nothing is computed from events. The account's own object is the expected content of its row.

Note [What the account does not do]
    Where Stripe's behaviour is not documented, the account avoids it: a refund of a charge after one of its refunds
    failed (whether ``amount_refunded`` falls is not known), an async payment that succeeds after it failed, a default
    currency that changes, an invoice that is overpaid or paid outside of Stripe, credit notes of both sides at once, a
    ledger that is read after its customer was deleted, an appeal that is made or decided within a second, and
    a dispute in the second of another event of its charge (``charge.disputed`` becomes true, and no event is documented
    that would name what it was before).

    It also avoids two ambiguous combinations of events within one second: a refund that fails in the second of its
    charge's last event (the charge may report it or not; by rule 10 of the design it does not), and a refund in the
    second of a capture in part (the charge may report the rest as refunded). Nor does it read a charge in the second
    of the charge's last change, or where the endpoint receives no events of its refunds: a read is dated a second
    before it was made, and so before, or within, events that do not contain what the read showed.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from schemas import observations
from schemas.inbox import Delivery
from schemas.observations import World
from tests import envelopes, ledger

Body = dict[str, Any]
Key = tuple[str, str]
"""A table, and the key of a row of it within its world."""

BEGINNING: Final = 1_793_200_000
"""The day of the newest API version."""
WORLDS: Final = (World("", livemode=False), World("", livemode=True), World("acct_1", livemode=False))
OF_REFUNDS: Final = ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated")
UNHEARD: Final = ((), (), (), (), (), OF_REFUNDS, ("charge.refunded",))
CURRENCIES: Final = ("usd", "eur", "jpy")


def at(seconds: int | None) -> datetime | None:
    """Return Stripe's *seconds* since 1970 as the time that a column holds."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


@dataclass
class Thing:
    """One object of the account: its body as Stripe shows it now, and facts that the body does not show.

    *reported* is the body that the last event of it showed, *as_of* the second of that event; *facts* are columns that
    the object itself does not show, such as when it was paid; *second* is the second of its last change. It *came back*
    if it returned within one second to a state that it had already had in that second. It *was twinned* if two events
    report one change.
    """

    table: str
    body: Body
    facts: dict[str, Any] = field(default_factory=dict)
    reported: Body | None = None
    as_of: int | None = None
    was_read: bool = False
    was_twinned: bool = False
    came_back: bool = False
    second: int = 0
    states: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        """The id of the object."""
        return str(self.body["id"])

    @property
    def key(self) -> Key:
        """The key of the object's row."""
        return (self.table, self.id)

    @property
    def is_known(self) -> bool:
        """Whether Payfold has heard of the object."""
        return self.reported is not None or self.was_read

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - JSON
        """Return a field as it is now."""
        return self.body[name]


@dataclass(frozen=True)
class Shape:
    """Undocumented behaviour of Stripe, and the endpoint's subscriptions; both vary from one history to the next."""

    names_before: bool
    """Whether events that are no ``.updated`` have ``previous_attributes`` (charge.captured, refund.failed …)."""
    updates_invoices: bool
    """Whether an ``invoice.updated`` goes with ``invoice.finalized`` and the like."""
    rest_is_refunded: bool
    """Whether ``amount_refunded`` of a charge captured in part contains what was released."""
    unheard: frozenset[str]
    """The types that the endpoint does not subscribe to: now and then those of refunds, so that their charges alone
    report them, or the one of charges, so that the refunds alone do."""

    @property
    def hears_refunds(self) -> bool:
        """Whether refunds are reported."""
        return "refund.created" not in self.unheard


@dataclass(frozen=True)
class Expected:
    """A row that the account expects: its *columns*, and the rows of which an anomaly excuses a wrong value in it."""

    columns: Mapping[str, Any]
    relies: frozenset[Key] = frozenset()


class Account:
    """The account's clock, its objects, and the events that it has reported so far."""

    def __init__(self, seed: str, number: int, *, twins: float) -> None:
        """Begin history *number*; three consecutive histories share their ids, in three worlds."""
        self.rng = random.Random(seed)
        self.number = number
        self.suffix = f"{number // len(WORLDS)}"
        self.world = WORLDS[number % len(WORLDS)]
        self.livemode = self.world.livemode
        self.twins = twins
        self.now = BEGINNING + self.rng.randrange(86_400)
        self.things: dict[Key, Thing] = {}
        self.deliveries: list[tuple[str, Delivery]] = []
        self.twinned = self.circled = False
        self._counts: defaultdict[str, int] = defaultdict(int)
        self.shape = Shape(
            names_before=self.chance(0.5),
            updates_invoices=self.chance(0.5),
            rest_is_refunded=self.chance(0.5),
            unheard=frozenset(self.rng.choice(UNHEARD)),
        )

    # ---- Time and chance ----

    def tick(self) -> None:
        """Let some time pass: often none, so that much happens in one second."""
        self.now += self.rng.choice((0, 0, 0, 0, 1, 1, 2, 60, 3600, self.rng.choice((20_000, 20_000, 100_000))))

    def chance(self, share: float) -> bool:
        """Return True in a *share* of all cases."""
        return self.rng.random() < share

    def name(self, prefix: str) -> str:
        """Return the id of a new object."""
        self._counts[prefix] += 1
        return f"{prefix}_{self.suffix}x{self._counts[prefix]}"

    def all_of(self, table: str) -> list[Thing]:
        """Return the objects of a kind, oldest first."""
        return [thing for (name, _), thing in self.things.items() if name == table]

    # ---- Objects ----

    def add(self, table: str, body: Body, **facts: object) -> Thing:
        """Make an object, without an event."""
        made = Thing(table, body, dict(facts), second=self.now)
        self.things[made.key] = made
        return made

    def change(self, thing: Thing, *types: str, before: bool | None = None, **fields: object) -> None:
        """Change *fields* of an object and report it by an event of each of *types*, if any.

        As at Stripe, an event of a type ``.updated`` always has the values *before* the change, other types sometimes.
        """
        previous = _difference(thing.body, fields)
        self._begin_second(thing)
        thing.body = {**thing.body, **fields}
        self._see_state(thing, moved=bool(previous))
        for type_ in types:
            named = type_.endswith(".updated") if before is None else before
            self.emit(thing, type_, previous if named and previous else None)

    def _begin_second(self, thing: Thing) -> None:
        if thing.second != self.now:
            thing.second, thing.states = self.now, set()
        thing.states.add(_text(thing.body))

    def _see_state(self, thing: Thing, *, moved: bool) -> None:
        """Note when an object returns to a state that it had in the same second: its events are a circle."""
        if moved and _text(thing.body) in thing.states:
            self.circled = thing.came_back = True

    def emit(self, thing: Thing, type_: str, previous: Body | None = None) -> None:
        """Report an object as it is, sometimes twice under two ids; do nothing if the endpoint is not subscribed."""
        if type_ in self.shape.unheard:
            return
        thing.reported, thing.as_of = thing.body, self.now
        self._emit(thing, type_, previous)
        if self.chance(self.twins):
            self.twinned = thing.was_twinned = True
            self._emit(thing, type_, previous)

    def _emit(self, thing: Thing, type_: str, previous: Body | None) -> None:
        id_ = f"evt_{self.rng.getrandbits(72):018x}"
        world: Body = {"account": self.world.account or None, "livemode": self.world.livemode}
        body = envelopes.event(id_, type_, self.now, thing.body, before=previous, **world)
        self.deliveries.append((thing.id, ledger.delivery(body)))

    def mention(self, type_: str, body: Body) -> None:
        """Report an object that the account does not keep, because nothing here depends on it."""
        self.emit(Thing("", {"livemode": self.livemode, "metadata": {}, **body}), type_)

    def observe(self, owner: str, type_: str, body: Body, created: int | None = None) -> None:
        """Record a read of *body*, dated one second before now: Stripe's ``Date`` less the duration of the call."""
        second = self.now - 1 if created is None else created
        read = observations.observe(
            type_, body, account=self.world.account, livemode=self.livemode, created=second, now=ledger.NOW
        )
        self.deliveries.append((owner, read))


def _text(body: Body) -> str:
    return json.dumps(body, sort_keys=True)


def _difference(body: Body, fields: Mapping[str, object]) -> Body:
    """Return the previous values of the fields that differ; of nested hashes only the keys that differ."""
    previous: Body = {}
    for name, value in fields.items():
        was = body.get(name)
        if was == value:
            continue
        if isinstance(was, dict) and isinstance(value, dict):
            previous[name] = {key: was.get(key) for key in sorted({*was, *value}) if was.get(key) != value.get(key)}
        else:
            previous[name] = was
    return previous


def picked(thing: Thing, names: Iterable[str]) -> dict[str, Any]:
    """Return columns that are fields of the object by the same name."""
    return {name: thing.body[name] for name in names}
