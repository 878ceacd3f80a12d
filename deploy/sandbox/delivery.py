"""Deliveries of events over HTTP, as unreliable as real ones.

:func:`plan` decides which events are sent in which order, and is pure: Stripe promises neither order nor single
delivery, and now and then makes two events of one change. :func:`deliver` carries a plan out: it signs each attempt
with the present time, takes any 2xx for success, follows no redirect, and tries failed attempts again. See
https://docs.stripe.com/webhooks.
"""

import asyncio
import itertools
import math
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import httpx

from deploy.sandbox.account import Event
from deploy.sandbox.rendering import twin
from deploy.sandbox.signing import sign

# A plan has no retries; deliveries make them.
Kind = Literal["first", "duplicate", "twin", "retry"]
Progress = Callable[["DeliveryReport"], None]


@dataclass(frozen=True, slots=True)
class Distortions:
    """How unreliable deliveries are: shares are from 0 to 1, of all events; times are in seconds."""

    events_per_second: float = 500.0
    """How fast the shop's history passes by."""
    late: float = 0.05
    late_seconds_max: float = 5.0
    twice: float = 0.05
    twice_seconds_max: float = 2.0
    twins: float = 0.01
    twin_seconds_max: float = 1.0
    out_of_order: float = 0.3
    """These are moved by a few neighbours only."""
    out_of_order_seconds_max: float = 0.05
    bursts: float = 0.2
    """These come in bursts: all wait for the last of their burst, and then come at once."""
    burst_events_max: int = 50


PERFECT: Final = Distortions(late=0, twice=0, twins=0, out_of_order=0, bursts=0)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One post of one event."""

    event: Event
    due: float
    """Seconds from the beginning."""
    kind: Kind


@dataclass(frozen=True, slots=True)
class Retries:
    """When an attempt that failed is made again: exponentially later, with a bound on tries and on time."""

    tries_max: int = 12
    first_seconds: float = 0.1
    longest_seconds: float = 10.0
    total_seconds_max: float = 120.0

    def wait_seconds(self, tries: int, elapsed_seconds: float) -> float | None:
        """Return how long to wait after *tries* failed ones, or null to give up."""
        wait = min(math.ldexp(self.first_seconds, tries - 1), self.longest_seconds)
        if tries >= self.tries_max or elapsed_seconds + wait > self.total_seconds_max:
            return None
        return wait


@dataclass(slots=True)
class DeliveryReport:
    """The results of a plan; the report grows while deliveries go on."""

    planned: int = 0
    """Attempts of the plan that have been begun."""
    sent: int = 0
    """Posts, of every kind and with every outcome."""
    accepted: int = 0
    """Posts that were answered with a 2xx."""
    duplicates: int = 0
    twins: int = 0
    retries: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    """Other answers, by status."""
    connection_errors: int = 0
    """Posts without an answer: refused or broken connections and time-outs."""
    first_sent: dict[str, float] = field(default_factory=dict)
    """When each event was first posted, in Unix seconds."""
    first_accepted: dict[str, float] = field(default_factory=dict)
    """When each event was first answered with a 2xx, in Unix seconds."""
    never_accepted: list[str] = field(default_factory=list)
    """The ids of the events that no answer accepted, in the order of their first post."""


def plan(events: Sequence[Event], *, seed: int, distortions: Distortions) -> list[Attempt]:
    """Return the attempts that deliver *events* (in their true order), by due time: each at least once.

    The same arguments give the same plan.
    """
    rng = random.Random(f"plan {seed}")
    attempts: list[Attempt] = []
    for event, moment in zip(events, _moments(len(events), rng, distortions), strict=True):
        due = moment
        if rng.random() < distortions.out_of_order:
            due += rng.uniform(0, distortions.out_of_order_seconds_max)
        if rng.random() < distortions.late:
            due += rng.uniform(0, distortions.late_seconds_max)
        attempts.append(Attempt(event, due, "first"))
        if rng.random() < distortions.twice:
            attempts.append(Attempt(event, due + rng.uniform(0, distortions.twice_seconds_max), "duplicate"))
        if rng.random() < distortions.twins:
            # From the moment of the change, so that a twin may come before the event that it repeats.
            twin_due = moment + rng.uniform(0, distortions.twin_seconds_max)
            attempts.append(Attempt(twin(event, seed=seed), twin_due, "twin"))
    attempts.sort(key=lambda attempt: attempt.due)
    return attempts


def _moments(count: int, rng: random.Random, distortions: Distortions) -> Iterable[float]:
    """Yield when each event would be sent if none were distorted but by bursts."""
    size_max = max(2, distortions.burst_events_max)
    size_mean = (2 + size_max) / 2
    # The probability that a step is a burst and not one event, such that the share of the events comes out.
    probability = distortions.bursts / (size_mean * (1 - distortions.bursts) + distortions.bursts)
    sent = 0
    while sent < count:
        size = rng.randint(2, size_max) if rng.random() < probability else 1
        size = min(size, count - sent)
        sent += size
        yield from itertools.repeat((sent - 1) / distortions.events_per_second, size)


async def deliver(
    attempts: Iterable[Attempt],
    *,
    url: str,
    secret: str,
    concurrency: int = 64,
    rate: float | None = None,
    timed: bool = False,
    retries: Retries | None = None,
    timeout_seconds: float = 20.0,
    clock: Callable[[], float] = time.time,
    on_progress: Progress | None = None,
) -> DeliveryReport:
    """Post *attempts* to *url*, in their order, and return the report.

    At most *concurrency* posts are in flight. Each attempt follows the one before as soon as there is room, or at
    *rate* attempts a second, or, when *timed*, not before its due time. *clock* gives the Unix seconds that are
    signed and reported. *on_progress* is called after each post with the report so far.
    """
    run = _Run(
        url=httpx.URL(url),
        secret=secret,
        retries=retries or Retries(),
        # The time-out in the form that a transport takes, as a client would pass it.
        extensions={"timeout": httpx.Timeout(timeout_seconds).as_dict()},
        clock=clock,
        on_progress=on_progress,
        line=asyncio.Queue(concurrency),
    )
    return await run.deliver(attempts, concurrency=concurrency, rate=rate, timed=timed)


@dataclass(slots=True)
class _Delivery:
    """An attempt of the plan and its retries."""

    attempt: Attempt
    begun: float
    """In seconds of the event loop's clock."""
    tries: int = 0


@dataclass(slots=True, kw_only=True)
class _Run:
    """One call of :func:`deliver`: a line of deliveries, and workers that take from its head.

    A delivery that has to be tried again waits outside the line, so that it holds up no other, and then joins the end
    of the line. Until then it counts as unfinished, so that ``line.join`` waits for it.
    """

    url: httpx.URL
    secret: str
    retries: Retries
    extensions: dict[str, object]
    clock: Callable[[], float]
    on_progress: Progress | None
    line: asyncio.Queue[_Delivery]
    report: DeliveryReport = field(default_factory=DeliveryReport)

    async def deliver(
        self, attempts: Iterable[Attempt], *, concurrency: int, rate: float | None, timed: bool
    ) -> DeliveryReport:
        ssl_context = httpx.create_ssl_context()
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(self._work(tasks, ssl_context)) for _ in range(concurrency)]
            await self._feed(attempts, rate=rate, timed=timed)
            await self.line.join()
            for worker in workers:
                worker.cancel()
        accepted = self.report.first_accepted
        self.report.never_accepted = [event for event in self.report.first_sent if event not in accepted]
        return self.report

    async def _feed(self, attempts: Iterable[Attempt], *, rate: float | None, timed: bool) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for number, attempt in enumerate(attempts):
            moment = max(attempt.due if timed else 0.0, number / rate if rate else 0.0)
            ahead = begun + moment - loop.time()
            if ahead > 0:
                await asyncio.sleep(ahead)
            await self.line.put(_Delivery(attempt, loop.time()))
            self.report.planned += 1

    async def _work(self, tasks: asyncio.TaskGroup, ssl_context: ssl.SSLContext) -> None:
        # A transport of one connection for each worker: a shared pool looks at all its connections for every
        # request, which at 64 of them costs four fifths of the time (measured: 490 posts a second against 2,280).
        one_connection = httpx.Limits(max_connections=1)
        async with httpx.AsyncHTTPTransport(verify=ssl_context, limits=one_connection) as transport:
            while True:
                delivery = await self.line.get()
                if await self._post(transport, delivery):
                    self.line.task_done()
                else:
                    tasks.create_task(self._later(delivery))
                if self.on_progress is not None:
                    self.on_progress(self.report)

    async def _later(self, delivery: _Delivery) -> None:
        """Put a failed delivery back into the line after its wait, or give it up."""
        elapsed = asyncio.get_running_loop().time() - delivery.begun
        wait = self.retries.wait_seconds(delivery.tries, elapsed)
        if wait is not None:
            await asyncio.sleep(wait)
            await self.line.put(delivery)
        self.line.task_done()

    async def _post(self, transport: httpx.AsyncHTTPTransport, delivery: _Delivery) -> bool:
        """Post once, and return whether it was accepted."""
        event = delivery.attempt.event
        self._count(delivery)
        self.report.first_sent.setdefault(event.id, self.clock())
        try:
            response = await transport.handle_async_request(self._request(event))
            await response.aread()
        except httpx.RequestError:
            self.report.connection_errors += 1
            return False
        if not response.is_success:
            self.report.refused[response.status_code] += 1
            return False
        self.report.accepted += 1
        self.report.first_accepted.setdefault(event.id, self.clock())
        return True

    def _count(self, delivery: _Delivery) -> None:
        kind: Kind = "retry" if delivery.tries else delivery.attempt.kind
        delivery.tries += 1
        self.report.sent += 1
        if kind == "retry":
            self.report.retries += 1
        elif kind == "duplicate":
            self.report.duplicates += 1
        elif kind == "twin":
            self.report.twins += 1

    def _request(self, event: Event) -> httpx.Request:
        headers = {
            "Accept": "*/*; q=0.5, application/xml",
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": sign(event.body, self.secret, int(self.clock())),
            "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
        }
        return httpx.Request("POST", self.url, headers=headers, content=event.body, extensions=self.extensions)
