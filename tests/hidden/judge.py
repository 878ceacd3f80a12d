"""Runs histories, delivers them out of order, folds them, and compares the tables; many histories in one database."""

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import msgspec
from sqlalchemy import Engine

from schemas import database, tables
from schemas.inbox import Delivery
from schemas.observations import World
from tests import ledger
from tests.hidden import shop, truth
from tests.hidden.account import Account, Expected, Key
from worker.proof import money_rules, rebuild, swap
from worker.proof.difference import Difference

AT_ONCE: Final = 200
SHOWN_MAX: Final = 12
IN_THE_FEED: Final = """
SELECT account, livemode, subject, subject_id, kind, after FROM changes WHERE withheld IS NULL ORDER BY seq
"""
REPEATED: Final = (
    *("order.refund_changed", "balance.changed", "payment_link.activated", "payment_link.deactivated"),
    "invoice.changed",
)
NAMED_BY: Final = {"balances": ("customer", "currency"), "payment_link_funnel": ("payment_link", "currency")}
TABLE_OF: Final = {"order": "orders", "balance": "balances"}
DULL: Final = (
    *("object", "livemode", "lines", "line_items", "features", "customer_details", "metadata", "after_expiration"),
    *("client_reference_id", "customer_email", "expires_at", "total_details", "collected_information", "url"),
)
"""Fields that are left out where events are shown."""
Place = tuple[World, Key]


@dataclass
class Report:
    """The result of a number of histories, counted by table where a count belongs to a table."""

    histories: int = 0
    events: int = 0
    seconds: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)
    flagged: Counter[str] = field(default_factory=Counter)
    flagged_wrong: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    doubled: Counter[str] = field(default_factory=Counter)
    untrue: Counter[str] = field(default_factory=Counter)
    flagged_plain: int = 0
    undecidable: int = 0
    """Changes of balances that went back and forth; twins leave their number open, but the final balance is certain."""
    drift: int = 0
    broken: int = 0
    unfolded: int = 0
    faults: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    """The rows that are flagged and wrong."""

    @property
    def flagged_share(self) -> float:
        """The share of rows with an anomaly in force."""
        return sum(self.flagged.values()) / max(1, sum(self.rows.values()))

    def __str__(self) -> str:
        """Show the counts, a line for each table or kind."""
        pace = self.histories / max(self.seconds, 0.001) * 60
        first = (
            f"{self.histories} histories, {self.events} events, {sum(self.rows.values())} rows in {self.seconds:.0f} s"
        )
        lines = [
            f"{first} ({pace:.0f} histories a minute)",
            f"drift {self.drift}, rules broken {self.broken}, not folded {self.unfolded}",
            f"changes of balances that cannot be counted: {self.undecidable}",
        ]
        lines += [
            _line(name, self.rows[name], self.flagged[name], self.flagged_wrong[name], self.wrong[name])
            for name in sorted(self.rows)
        ]
        kinds = sorted({*self.lost, *self.doubled, *self.untrue})
        lines += [
            f"{kind}: lost {self.lost[kind]}, doubled {self.doubled[kind]}, untrue {self.untrue[kind]}"
            for kind in kinds
        ]
        return "\n".join([*lines, *self.faults[:SHOWN_MAX], *self.doubts[:SHOWN_MAX]])


def _line(name: str, rows: int, flagged: int, flagged_wrong: int, wrong: int) -> str:
    return f"{name}: {rows} rows, {flagged} flagged ({flagged_wrong} of them wrong), {wrong} wrong in silence"


# ---- How histories arrive ----


def tangled(account: Account) -> list[Delivery]:
    """Return the account's events in a possible order of arrival, some of them twice."""
    chance, found = account.rng, [delivery for _, delivery in account.deliveries]
    found += [one for one in found if chance.random() < 0.08]
    way = chance.choice(("permuted", "permuted", "nearly", "reversed"))
    if way == "permuted":
        chance.shuffle(found)
    elif way == "reversed":
        found.reverse()
    else:
        found = [found[place] for place in sorted(range(len(found)), key=lambda place: place + chance.random() * 6)]
    return found


def interleaved(accounts: Sequence[Account], rng: random.Random) -> list[Delivery]:
    """Return the deliveries of all accounts, mixed; those of one account keep their order."""
    mixed = []
    for account in accounts:
        found = tangled(account)
        # Some come in one burst, others over the whole time.
        width = rng.choice((0.01, 0.2, 1.0))
        start = rng.random() * (1 - width)
        places = sorted(start + rng.random() * width for _ in found)
        mixed += list(zip(places, found, strict=True))
    return [one for _, one in sorted(mixed, key=lambda pair: pair[0])]


def take_in(engine: Engine, accounts: Sequence[Account], rng: random.Random) -> None:
    """Record and fold the accounts' events, in batches of all sizes, by several workers."""
    deliveries = interleaved(accounts, rng)
    sizes = [rng.choice((3, 20, 200, 1000, 4000)) for _ in deliveries]
    for batch in ledger.batches(deliveries, sizes):
        ledger.record(engine, batch)
        ledger.fold_with_workers(engine, rng.randint(2, 4), limit=rng.choice((50, 200, 500)))


# ---- Judging ----


def read_rows(engine: Engine) -> dict[Place, Mapping[str, Any]]:
    """Return every row of the tables that an account has expectations about."""
    found: dict[Place, Mapping[str, Any]] = {}
    names = [each.name for each in tables.PROJECTIONS if each.name != "balance_changes"]
    for table in (*names, "order_book", "payment_link_funnel"):
        for row in ledger.rows(engine, f"SELECT * FROM {table}"):  # noqa: S608 - our own names
            name = " ".join(str(row[column]) for column in NAMED_BY.get(table, ("id",)))
            found[_world(row), (table, name)] = row
    return found


def read_flags(engine: Engine) -> dict[Place, str]:
    """Return the rows with an anomaly in force, and the anomaly's kind."""
    statement = "SELECT account, livemode, subject, subject_id, kind FROM anomalies WHERE resolved_at IS NULL"
    return {
        (_world(row), (TABLE_OF.get(row["subject"], f"{row['subject']}s"), row["subject_id"])): row["kind"]
        for row in ledger.rows(engine, statement)
    }


class Judge:
    """Compares the accounts' expectations with the tables, and counts the differences."""

    def __init__(self, engine: Engine, report: Report) -> None:
        """Read the tables once, for all accounts."""
        self.report = report
        self.rows = read_rows(engine)
        self.flags = read_flags(engine)
        self.announced = self._read_news(engine)
        self.moved = self._read_balance_changes(engine)
        self.last = self._read_topics(engine)

    @staticmethod
    def _read_topics(engine: Engine) -> dict[tuple[World, truth.Topic], list[Mapping[str, Any]]]:
        """Return for each topic of repeating changes their contents, in the feed's order."""
        found: dict[tuple[World, truth.Topic], list[Mapping[str, Any]]] = {}
        for row in ledger.rows(engine, IN_THE_FEED):
            if row["kind"] in REPEATED:
                currency = row["after"]["currency"] if row["kind"] == "balance.changed" else ""
                topic = (row["subject"], row["subject_id"], currency)
                found.setdefault((_world(row), topic), []).append(row["after"])
        return found

    @staticmethod
    def _read_news(engine: Engine) -> Counter[tuple[World, truth.News]]:
        return Counter(
            (_world(row), (row["subject"], row["subject_id"], _kind(row)))
            for row in ledger.rows(engine, IN_THE_FEED)
            if row["kind"] in truth.KNOWN_KINDS
        )

    @staticmethod
    def _read_balance_changes(engine: Engine) -> Counter[tuple[World, tuple[Any, ...]]]:
        columns = ("customer", "currency", "amount", "ending_balance", "as_of")
        return Counter(
            (_world(row), tuple(row[name] for name in columns))
            for row in ledger.rows(engine, "SELECT * FROM balance_changes")
        )

    def judge(self, account: Account) -> None:
        """Judge one history and remove its rows, so that the rows left in the end belong to no account."""
        self.report.histories += 1
        self.report.events += len(account.deliveries)
        for key, expected in truth.rows(account):
            self._judge_row(account, key, expected)
        self._judge_news(account)
        self._judge_balance_changes(account)
        for topic, last, relies in truth.last_announced(account):
            self._judge_topic(account, topic, last, relies)

    def _judge_topic(self, account: Account, topic: truth.Topic, last: truth.Last, relies: frozenset[Key]) -> None:
        """Check that the last announcement is the final state, and that no two consecutive changes are equal."""
        found = self.last.pop((account.world, topic), [])
        if not found and last.is_silent:
            return
        if any(one == other for one, other in pairwise(found)):
            self._fault(self.report.doubled, topic[0], _shown(account, topic[:2], {"the same twice": found}))
        found_last = {name: found[-1].get(name) for name in last.after} if found else None
        if found_last != last.after and not any((account.world, key) in self.flags for key in relies):
            self._fault(
                self.report.lost, topic[0], _shown(account, topic[:2], {"last": (found_last, last.after)}, relies)
            )

    def rest(self) -> None:
        """Count the rows, changes and balance changes that no account expects."""
        for _, (table, name) in self.rows:
            self._fault(self.report.wrong, table, f"{table} {name}: no account knows of this row")
        for (_, news), count in self.announced.items():
            self._fault(self.report.untrue, news[2], f"{news}: announced {count} times, and never happened")
        for (_, change), count in self.moved.items():
            self._fault(self.report.wrong, "balance_changes", f"{change}: {count} times, and never happened")

    def _fault(self, counter: Counter[str], name: str, text: str) -> None:
        counter[name] += 1
        self.report.faults.append(text)

    def _judge_row(self, account: Account, key: Key, expected: Expected) -> None:
        place = (account.world, key)
        row, flag = self.rows.pop(place, None), self.flags.get(place)
        wrong = {
            name: (None if row is None else row[name], value)
            for name, value in expected.columns.items()
            if row is None or row[name] != value
        }
        self.report.rows[key[0]] += 1
        excuse = flag or next(
            (self.flags[found] for one in expected.relies if (found := (account.world, one)) in self.flags), None
        )
        if flag or (wrong and excuse):
            self.report.flagged[key[0]] += 1
            self.report.flagged_wrong[key[0]] += bool(wrong)
            if wrong:
                self.report.doubts.append(_shown(account, key, {str(excuse): wrong}, expected.relies))
            self._judge_flag(account, key, str(excuse))
        elif wrong:
            self._fault(self.report.wrong, key[0], _shown(account, key, wrong, expected.relies))

    def _judge_flag(self, account: Account, key: Key, flag: str) -> None:
        """Check that an object without twins and circles has no anomaly."""
        if not account.twinned and not account.circled:
            self.report.flagged_plain += 1
            self.report.faults.append(_shown(account, key, {"flag": flag}))

    def _judge_news(self, account: Account) -> None:
        for news, (least, most) in truth.news(account).items():
            count = self.announced.pop((account.world, news), 0)
            if count < least:
                self._fault(self.report.lost, news[2], _shown(account, news[:2], {news[2]: "lost"}))
            if count > most:
                self._fault(self.report.doubled, news[2], _shown(account, news[:2], {news[2]: f"{count} times"}))

    def _judge_balance_changes(self, account: Account) -> None:
        for change, count in truth.balance_changes(account).items():
            found = self.moved.pop((account.world, change), 0)
            self.report.rows["balance_changes"] += count
            customer = account.things["customers", change[0]]
            if found > count and customer.was_twinned and customer.came_back:
                self.report.undecidable += 1
            elif found != count:
                shown = {"balance_changes": (found, count), "change": change}
                self._fault(self.report.wrong, "balance_changes", _shown(account, ("customers", change[0]), shown))


def _world(row: Mapping[str, Any]) -> World:
    return World(row["account"], row["livemode"])


def _kind(row: Mapping[str, Any]) -> str:
    return f"{row['kind']}:{row['after']['status']}" if row["kind"] == "dispute.closed" else str(row["kind"])


def _shown(account: Account, key: tuple[str, str], wrong: object, relies: Iterable[Key] = ()) -> str:
    """Return a fault with the history's number and the shortened events of its object and of those it *relies* on."""
    owners = {name.split(" ")[0] for _, name in (key, *relies)}
    events = [_shortened(delivery) for owner, delivery in account.deliveries if owner in owners]
    return "\n  ".join([f"history {account.number}, {key[0]} {key[1]}: (row, truth) {wrong}", *events])


def _shortened(delivery: Delivery) -> str:
    envelope = delivery.envelope
    data = msgspec.json.decode(envelope.payload)["data"]
    about = {name: value for name, value in data["object"].items() if value not in (None, {}, []) and name not in DULL}
    return f"{envelope.created} {envelope.type} {about} before {data.get('previous_attributes')}"


# ---- Runs ----


def groups(histories: int) -> Iterator[range]:
    """Yield the numbers of the histories that live in one database at once."""
    for start in range(0, histories, AT_ONCE):
        yield range(start, min(start + AT_ONCE, histories))


def run(engine: Engine, seed: int, histories: int, *, twins: float) -> Report:
    """Run, fold and judge so many *histories*, a share of *twins* of their events under two ids."""
    report, began = Report(), time.monotonic()
    for numbers in groups(histories):
        accounts = [shop.live(f"{seed}.{number}", number, twins=twins) for number in numbers]
        ledger.clear(engine)
        take_in(engine, accounts, random.Random(f"{seed}.{numbers.start}"))
        judge(engine, accounts, report)
        prove(engine, report)
    report.seconds = time.monotonic() - began
    return report


def judge(engine: Engine, accounts: Sequence[Account], report: Report) -> None:
    """Judge all histories of one database."""
    judging = Judge(engine, report)
    for account in accounts:
        judging.judge(account)
    judging.rest()


def prove(engine: Engine, report: Report) -> None:
    """Compare the tables with a rebuild and with the money rules; check that every event is folded or ignored."""
    (counted,) = ledger.rows(engine, "SELECT count(*) AS number FROM events WHERE state IN ('pending', 'parked')")
    report.unfolded += counted["number"]
    differences: list[Difference] = []
    with rebuild.rebuilt(engine) as made:
        swap.compare(made, on_difference=differences.append)
    report.drift += len(differences)
    report.faults += [f"a rebuild differs: {difference}" for difference in differences]
    with database.transaction(engine) as connection, database.cursor(connection) as cursor:
        broken = [finding for finding in money_rules.check(cursor)[1] if finding.state == "broken"]
    report.broken += len(broken)
    report.faults += [f"rule broken: {finding}" for finding in broken]
