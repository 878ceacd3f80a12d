"""``payfold demo``: a shop's worth of deliveries, late, twice and out of order, and the proof that the tables hold.

Payfold also finds the carts that were left behind and expires them; some of their buyers come back.

Note [A twin can look like an honest repeat]
    Stripe rarely reports one change in two events with different ids (twins). Where a balance goes down, up and down
    again within a second, a twin of the first step looks exactly like a fourth step. Only the ledger, which has to be
    requested, shows the difference. So balances are compared with the shop's own books except for customers with a
    twin.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import Engine, text

from deploy.local.running import Running
from deploy.local.signals import run_until_signal
from deploy.output import money, table
from deploy.sandbox.account import Account
from deploy.sandbox.delivery import PERFECT, Attempt, DeliveryReport, Distortions, deliver, plan
from deploy.sandbox_shop import ACCOUNT, SandboxShop
from schemas import database, summary
from schemas.errors import ConflictError
from schemas.settings import Settings
from schemas.summary import LinkFunnel, Summary
from worker.proof import swap
from worker.proof.rebuild import refolded

EVENTS_PER_SECOND: Final = 500
STEP_SECONDS_MAX: Final = 60

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of the proof: orders and balances unlike the shop's own books, and the tables folded again."""

    forgotten: int
    """Carts that were left behind and are not expired."""
    differing: int
    unbalanced: int
    pending: int
    refolded: swap.Proof

    @property
    def holds(self) -> bool:
        """Whether everything was proven."""
        wrong = self.forgotten + self.differing + self.unbalanced + self.pending
        return wrong == 0 and self.refolded.holds


def run(
    running: Running, shop: SandboxShop, *, seed: int, progress_to: Console, summary_to: Console
) -> bool:  # fmt: skip
    """Deliver what *shop* sold, fold, recover carts, print what happened, and return whether the proof holds."""
    engine = database.engine(running.settings.postgresql)
    with _bars(progress_to) as bars:
        with shop.stripe.lock:
            sold = list(shop.account.events)
        attempts = plan(sold, seed=seed, distortions=Distortions(events_per_second=EVENTS_PER_SECOND))
        report = _deliver(running, bars, "Deliveries, late, twice and out of order", attempts)
        expired = _step(bars, "Carts left behind are expired at Stripe", lambda: _wait_until_expired(engine, shop))
        # The sandbox's Stripe sent events of those too, and sends events of the buyers who came back.
        later = shop.recover(expired[::2])[len(sold) :]
        back = _deliver(running, bars, "Some of their buyers come back", plan(later, seed=seed, distortions=PERFECT))
        pending = _step(bars, "The worker folds and reads the last of them", lambda: _wait_until_folded(engine))
        twinned = {attempt.event.object_id for attempt in attempts if attempt.kind == "twin"}
        proof = _prove(bars, engine, shop, seed, pending=pending, twinned=twinned)
    _summarize(summary_to, engine, shop, report, proof)
    engine.dispose()
    return proof.holds and not report.never_accepted and not back.never_accepted


def refuse_the_orders_of_others(settings: Settings) -> None:
    """Raise ConflictError where DATABASE_URL names an inbox with events that no demo made: they are not to be mixed."""
    if settings.database_url is None:
        return
    engine = database.engine(settings.postgresql)
    try:
        has_inbox = _rows(engine, "SELECT to_regclass('inbox') IS NOT NULL AS found")[0]["found"]
        if has_inbox and _rows(engine, "SELECT FROM inbox WHERE account <> :account LIMIT 1", account=ACCOUNT):
            raise ConflictError("The inbox at DATABASE_URL holds events that no demo made: name an empty database.")
    finally:
        engine.dispose()


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _step(bars: Progress, words: str, work: Callable[[], Result]) -> Result:
    task = bars.add_task(words, total=1)
    result = work()
    bars.advance(task)
    return result


def _deliver(running: Running, bars: Progress, words: str, attempts: Sequence[Attempt]) -> DeliveryReport:
    task = bars.add_task(words, total=len(attempts))
    return run_until_signal(
        deliver(
            attempts,
            url=f"{running.address}/webhooks/stripe",
            secret=running.secret,
            timed=True,
            on_progress=lambda report: bars.update(task, completed=report.planned),
        )
    )


def _wait_until_expired(engine: Engine, shop: SandboxShop) -> list[str]:
    """Return the carts left behind that have expired in the change feed: all, if there is time."""
    deadline = time.monotonic() + STEP_SECONDS_MAX
    while len(expired := _rows(engine, _EXPIRED, left=shop.left)) < len(shop.left) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [row["id"] for row in expired if row["recovery_url"] is not None]


_EXPIRED: Final = """
SELECT o.id, o.recovery_url FROM changes AS c JOIN orders AS o ON (o.account, o.livemode, o.id) =
    (c.account, c.livemode, c.subject_id)
WHERE c.kind = 'order.expired' AND o.id = ANY (:left) ORDER BY c.seq
"""


def _wait_until_folded(engine: Engine) -> int:
    """Return how much work is left to fold or to read from Stripe: 0, if there is time."""
    deadline = time.monotonic() + STEP_SECONDS_MAX
    while (pending := int(_rows(engine, _TO_DO)[0]["found"])) > 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    return pending


_TO_DO: Final = """
SELECT (SELECT count(*) FROM pending)
    + (SELECT count(*) FROM stripe_calls WHERE given_up IS NULL)
    + (SELECT count(*) FROM changes WHERE seq >
        (SELECT coalesce(max(reached_seq), 0) FROM stripe_jobs WHERE job = 'fetch'))
    AS found
"""


def _prove(
    bars: Progress, engine: Engine, shop: SandboxShop, seed: int, *, pending: int, twinned: Collection[str]
) -> Proof:
    reported = {event.object_id for event in shop.account.events if event.type.startswith("checkout.session.")}
    known = reported.union(shop.left, shop.young)
    forgotten = len(shop.left) - len(_rows(engine, _EXPIRED, left=shop.left))
    held = {row["id"]: tuple(row.values())[1:] for row in _rows(engine, _HELD)}
    differing = sum(held.get(session) != _expected(shop.account, session) for session in known)
    balances = _rows(engine, "SELECT customer, currency, amount FROM balances")
    unbalanced = sum(
        row["amount"] != shop.account.expected_balance(row["customer"], row["currency"])
        for row in balances
        if row["customer"] not in twinned
    )
    recorded = int(_rows(engine, "SELECT count(*) AS events FROM inbox")[0]["events"])
    task = bars.add_task("The inbox folded again, in another order", total=recorded)
    with refolded(engine, seed=seed, progress=lambda _, done, __: bars.update(task, completed=done)) as made:
        return Proof(forgotten, differing, unbalanced, pending, swap.prove(made))


_HELD: Final = "SELECT id, status, refunded_amount, credited_amount, disputed_amount FROM order_book"


def _expected(shop: Account, session: str) -> tuple[str | int | None, ...]:
    """Return an order from the shop's own books, in the columns of ``_HELD``."""
    return (
        shop.expected_status(session),
        shop.expected_refunded(session),
        shop.expected_credited(session),
        shop.expected_disputed(session),
    )


def _rows(engine: Engine, statement: str, **values: object) -> list[dict[str, Any]]:
    with database.transaction(engine) as connection:
        return [dict(row) for row in connection.execute(text(statement), values).mappings()]


def _summarize(console: Console, engine: Engine, shop: SandboxShop, report: DeliveryReport, proof: Proof) -> None:
    answers = ", ".join(f"{count:,} of {status}" for status, count in sorted(report.refused.items()))
    latency = _latency(engine, report)
    _lines(
        console,
        "Deliveries",
        {
            "events that happened": f"{len(shop.account.events):,}",
            "posts sent": f"{report.sent:,}",
            "answered 200": f"{report.accepted:,}",
            "sent twice": f"{report.duplicates:,}",
            "twins (another id, same content)": f"{report.twins:,}",
            "retries": f"{report.retries:,}",
            "refused": answers or "none",
            "never accepted": f"{len(report.never_accepted):,}",
            "delivery to folded": f"p50 {latency[49] * 1000:,.0f} ms, p99 {latency[98] * 1000:,.0f} ms",
        },
    )
    with database.transaction(engine) as connection:
        sums, links = summary.read(connection, None, account=ACCOUNT), summary.funnel(connection, account=ACCOUNT).rows
    for sold in sums:
        _sold(console, sold)
    _carts(console, engine, shop)
    _after_the_sale(console, _rows(engine, _AFTER))
    _funnel(console, sorted(links, key=lambda link: (-link.opened, link.payment_link)))
    _proof(console, proof)


def _latency(engine: Engine, report: DeliveryReport) -> list[float]:
    """Return the percentiles, 1 to 99, of the seconds from an event's first post to its folding."""
    folded = _rows(
        engine,
        "SELECT id, extract(epoch FROM folded_at)::float8 AS at FROM events WHERE account = :account"
        " AND folded_at IS NOT NULL",
        account=ACCOUNT,
    )
    taken = [max(0.0, row["at"] - report.first_sent[row["id"]]) for row in folded if row["id"] in report.first_sent]
    return quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else [0.0] * 99


_AFTER: Final = """
SELECT 1 AS place, 'refunds' AS what, status, currency, count(*) AS found, sum(amount) AS amount
FROM refunds GROUP BY status, currency
UNION ALL SELECT 2, 'disputes', status, currency, count(*), sum(amount) FROM disputes GROUP BY status, currency
UNION ALL SELECT 3, 'invoices', status, currency, count(*), sum(total) FROM invoices GROUP BY status, currency
UNION ALL SELECT 4, 'credit notes', status, currency, count(*), sum(amount) FROM credit_notes GROUP BY status, currency
UNION ALL SELECT 5, 'customer balances', CASE WHEN amount < 0 THEN 'credit' WHEN amount > 0 THEN 'owed' ELSE 'even' END,
    currency, count(*), sum(amount) FROM balances GROUP BY 3, currency
UNION ALL SELECT 6, 'portal configurations', CASE WHEN active THEN 'active' ELSE 'inactive' END, NULL, count(*), NULL
FROM portal_configurations GROUP BY 3
UNION ALL SELECT 7, 'portal sessions', 'created', NULL, count(*), NULL FROM portal_sessions HAVING count(*) > 0
ORDER BY place, status, currency
"""


def _sold(console: Console, sums: Summary) -> None:
    counts = sorted(sums.orders_by_status.items(), key=lambda item: -item[1])
    _lines(console, "Orders", {str(status): f"{count:,}" for status, count in counts})
    paid = {each.currency: each.amount for each in sums.orders if each.status == "paid"}
    taken = {currency: money(amount, currency) for currency, amount in paid.items() if currency and amount is not None}
    _lines(console, "Money of paid orders", taken)


def _lines(console: Console, title: str, lines: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(min_width=34)
    table.add_column(justify="right")
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table)
    console.print()


def _carts(console: Console, engine: Engine, shop: SandboxShop) -> None:
    (found,) = _rows(engine, _FOUND, left=shop.left, open=shop.left + shop.young)
    _lines(
        console,
        "Carts left behind",
        {
            "open sessions found by asking Stripe": f"{found['found']:,} of {len(shop.left) + len(shop.young):,}",
            "expired at Stripe, being too old": f"{found['expired']:,} of {len(shop.left):,}",
            "still open, being young": f"{found['open']:,} of {len(shop.young):,}",
            "items given back to the stock": f"{found['items']:,}",
            "recovered by their buyers, and paid": f"{found['recovered']:,}",
            "calls to Stripe": f"{len(shop.stripe.calls):,}",
        },
    )


_FOUND: Final = """
SELECT
    (SELECT count(DISTINCT object_id) FROM inbox WHERE source = 'observation' AND object_id = ANY (:open)) AS found,
    (SELECT count(*) FROM changes WHERE kind = 'order.expired' AND subject_id = ANY (:left)) AS expired,
    (SELECT count(*) FROM orders WHERE status = 'open' AND id = ANY (:open)) AS open,
    (SELECT coalesce(sum(quantity::bigint), 0)
        FROM changes CROSS JOIN LATERAL jsonb_path_query(after, '$.lines[*].quantity') AS quantity
        WHERE kind = 'order.expired' AND subject_id = ANY (:left)) AS items,
    (SELECT count(*) FROM orders WHERE status = 'paid' AND recovered_from = ANY (:left)) AS recovered
"""


def _after_the_sale(console: Console, found: list[dict[str, Any]]) -> None:
    """Print what became of the money, a line for each kind and state: how many, and how much in each currency."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        lines.setdefault((row["what"], row["status"]), []).append(row)
    table = Table(title="After the sale", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("", "state", "count", "amounts"):
        table.add_column(name, justify="right" if name == "count" else "left", header_style="", overflow="fold")
    for (what, status), rows in lines.items():
        amounts = [money(int(row["amount"]), row["currency"]) for row in rows if row["amount"] is not None]
        table.add_row(what, status, f"{sum(row['found'] for row in rows):,}", ", ".join(amounts))
    console.print(table)
    console.print()


def _funnel(console: Console, found: Sequence[LinkFunnel]) -> None:
    numbers = ("opened", "completed", "paid", "expired")
    rows = [
        [
            row.payment_link,
            *(f"{getattr(row, name):,}" for name in numbers),
            money(row.amount_paid, row.currency or ""),
        ]
        for row in found
    ]
    columns = ("payment link", *numbers, "amount paid")
    table(columns, rows, numbers=columns[1:], title="Payment links", to=console)
    console.print()


def _proof(console: Console, proof: Proof) -> None:
    live, again = proof.refolded.live[-1].sha256, proof.refolded.again[-1].sha256
    _lines(
        console,
        "Proof",
        {
            "carts left behind that are not expired": f"{proof.forgotten:,}",
            "orders unlike the shop's own books": f"{proof.differing:,}",
            "balances unlike the shop's own books": f"{proof.unbalanced:,}",
            "events left pending, calls left to make": f"{proof.pending:,}",
            "digest of the live tables": live[:32],
            "digest of a rebuild in another order": again[:32],
        },
    )
    for each in proof.refolded.differences:
        what = each.kind if each.column is None else f"{each.column} is {each.held}, refolded {each.expected}"
        console.print(f"  {each.table} {each.id}: {what}", markup=False, soft_wrap=True)
    console.print("The tables are what the events say." if proof.holds else "The proof does NOT hold.", style="bold")
