"""Delivery plans have the promised distortions, and deliveries are retried over a real connection."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st

from deploy.sandbox import Event
from deploy.sandbox.delivery import PERFECT, Attempt, DeliveryReport, Distortions, Retries, deliver, plan
from deploy.sandbox.history import shop_history, tangle

SECRET = "whsec_test"
SEEDS = st.integers(min_value=0, max_value=2**32)
SHARES = st.floats(min_value=0, max_value=1)
DISTORTIONS = st.builds(Distortions, late=SHARES, twice=SHARES, twins=SHARES, out_of_order=SHARES, bursts=SHARES)
AT_ONCE = Retries(tries_max=4, first_seconds=0.0)

# A receiver's reaction to the number-th post of an event (from 1): answer with a status, hang up, or stay silent.
HANG_UP = 0
SILENCE = -1
Answer = Callable[[str, int], int]


@dataclass
class Receiver:
    """A minimal webhook endpoint on a port of its own."""

    answer: Answer
    posts: list[str] = field(default_factory=list)
    """The event ids in the order of their arrival."""
    signatures: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the posts of one connection until either side hangs up."""
        try:
            while await self._answer_one(reader, writer):
                pass
        except asyncio.IncompleteReadError:
            pass  # the client is done
        finally:
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = (await reader.readexactly(int(headers["content-length"]))).decode()
        assert stripe.WebhookSignature.verify_header(body, headers["stripe-signature"], SECRET)
        self.signatures.append(headers["stripe-signature"])
        event = body.split('"', 4)[3]
        self.posts.append(event)
        status = self.answer(event, self.posts.count(event))
        if status == SILENCE:
            await reader.read()  # until the client gives up
        if status in {HANG_UP, SILENCE}:
            return False
        writer.write(b"HTTP/1.1 %d Reason\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n" % status)
        await writer.drain()
        return True


def run(
    attempts: list[Attempt],
    answer: Answer,
    *,
    concurrency: int = 4,
    timeout_seconds: float = 20.0,
    on_progress: Callable[[DeliveryReport], None] | None = None,
) -> tuple[DeliveryReport, Receiver]:
    """Deliver *attempts* to a receiver that reacts by *answer*; a second passes at every read of the clock."""
    receiver = Receiver(answer)

    async def main() -> DeliveryReport:
        server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await deliver(
                attempts,
                url=f"http://127.0.0.1:{port}/webhooks/stripe",
                secret=SECRET,
                concurrency=concurrency,
                retries=AT_ONCE,
                timeout_seconds=timeout_seconds,
                clock=itertools.count(1_700_000_000).__next__,
                on_progress=on_progress,
            )

    return asyncio.run(main()), receiver


def always(status: int) -> Answer:
    """Return the reaction of a receiver that always answers with the same status."""
    return lambda _event, _number: status


@pytest.fixture
def events() -> list[Event]:
    """The events of a small shop."""
    return shop_history(seed=2, orders=30).events


@given(SEEDS, DISTORTIONS)
def test_plan_attempts_everything(seed: int, distortions: Distortions) -> None:
    """With any distortions, every event has exactly one first attempt, and attempts are sorted by due time."""
    events = tangle(seed).events

    attempts = plan(events, seed=seed, distortions=distortions)

    firsts = [attempt.event.id for attempt in attempts if attempt.kind == "first"]
    assert sorted(firsts) == sorted(event.id for event in events)
    dues = [attempt.due for attempt in attempts]
    assert dues == sorted(dues)
    assert min(dues) >= 0
    assert plan(events, seed=seed, distortions=distortions) == attempts


@given(SEEDS)
def test_plan_repeats(seed: int) -> None:
    """A duplicate is the same event after its first attempt; a twin has the same content under an id of its own."""
    events = tangle(seed).events
    attempts = plan(events, seed=seed, distortions=Distortions(twice=1, twins=1))
    first_due = {attempt.event.id: attempt.due for attempt in attempts if attempt.kind == "first"}

    kinds = Counter(attempt.kind for attempt in attempts)
    assert kinds == {"first": len(events), "duplicate": len(events), "twin": len(events)}
    for attempt in attempts:
        if attempt.kind == "duplicate":
            assert attempt.due >= first_due[attempt.event.id]
        if attempt.kind == "twin":
            assert attempt.event.id not in first_due


def test_plan_without_distortions(events: list[Event]) -> None:
    """A plan without distortions has the true order, with one post for each event."""
    attempts = plan(events, seed=1, distortions=PERFECT)

    assert [attempt.event for attempt in attempts] == events


def test_plan_distorts() -> None:
    """The plan has the configured shares: events change places, some come late, and bursts come at one moment."""
    events = shop_history(seed=2, orders=2_000).events
    attempts = plan(events, seed=1, distortions=Distortions(late=0.1, twice=0.2, twins=0.1, bursts=0))
    bursts = plan(events, seed=1, distortions=Distortions(late=0, twice=0, twins=0, out_of_order=0, bursts=0.5))

    kinds = Counter(attempt.kind for attempt in attempts)
    assert kinds["duplicate"] == pytest.approx(0.2 * len(events), rel=0.2)
    assert kinds["twin"] == pytest.approx(0.1 * len(events), rel=0.3)
    assert [attempt.event for attempt in attempts if attempt.kind == "first"] != events
    together = Counter(attempt.due for attempt in bursts)
    in_bursts = sum(size for size in together.values() if size > 1)
    assert in_bursts == pytest.approx(0.5 * len(events), rel=0.3)


def test_delivers(events: list[Event]) -> None:
    """Every event is posted, signed as Stripe signs, and reported."""
    attempts = plan(events, seed=1, distortions=Distortions(twice=0.5, twins=0.5))
    seen: list[int] = []

    report, receiver = run(attempts, always(200), on_progress=lambda so_far: seen.append(so_far.sent))

    kinds = Counter(attempt.kind for attempt in attempts)
    assert Counter(receiver.posts) == Counter(attempt.event.id for attempt in attempts)
    assert report.sent == report.accepted == report.planned == len(attempts) == len(seen)
    assert (report.duplicates, report.twins, report.retries) == (kinds["duplicate"], kinds["twin"], 0)
    assert report.first_accepted.keys() == report.first_sent.keys() == set(receiver.posts)
    assert all(report.first_accepted[event] > report.first_sent[event] for event in report.first_sent)
    assert report.never_accepted == []


def test_order_of_the_plan(events: list[Event]) -> None:
    """With one post at a time the events arrive in the order of the plan."""
    attempts = plan(events, seed=1, distortions=Distortions())

    _, receiver = run(attempts, always(200), concurrency=1)

    assert receiver.posts == [attempt.event.id for attempt in attempts]


@pytest.mark.parametrize("status", [503, 400, 302, 429])
def test_refused_once(events: list[Event], status: int) -> None:
    """After an answer that is not a 2xx the event is posted again with a new signature; redirects are not followed."""
    attempts = plan(events, seed=1, distortions=PERFECT)

    report, receiver = run(attempts, lambda _event, number: status if number == 1 else 204)

    assert Counter(receiver.posts) == {event.id: 2 for event in events}
    assert report.refused == {status: len(events)}
    assert report.retries == report.accepted == len(events)
    assert report.never_accepted == []
    assert len(set(receiver.signatures)) == len(receiver.signatures)


def test_dropped_connection(events: list[Event]) -> None:
    """A connection that breaks before the answer is an error, and the event is sent again."""
    attempts = plan(events, seed=1, distortions=PERFECT)

    report, receiver = run(attempts, lambda _event, number: HANG_UP if number == 1 else 200)

    assert Counter(receiver.posts) == {event.id: 2 for event in events}
    assert report.connection_errors == report.retries == len(events)
    assert report.never_accepted == []


def test_silence(events: list[Event]) -> None:
    """A receiver that does not answer in time counts as an error, and the event is sent again."""
    attempts = plan(events[:4], seed=1, distortions=PERFECT)

    report, receiver = run(attempts, lambda _, number: SILENCE if number == 1 else 200, timeout_seconds=0.05)

    assert Counter(receiver.posts) == {event.id: 2 for event in events[:4]}
    assert report.connection_errors == 4
    assert report.never_accepted == []


@pytest.mark.parametrize("pace", [{"rate": 100.0}, {"timed": True}])
def test_pace(events: list[Event], pace: dict[str, Any]) -> None:
    """Posts are held back to the rate, or to their due times."""
    attempts = plan(events[:6], seed=1, distortions=replace(PERFECT, events_per_second=100.0))

    async def main() -> tuple[float, DeliveryReport]:
        receiver = Receiver(always(200))
        server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        begun = asyncio.get_running_loop().time()
        async with server:
            report = await deliver(attempts, url=f"http://127.0.0.1:{port}/", secret=SECRET, **pace)
        return asyncio.get_running_loop().time() - begun, report

    seconds, report = asyncio.run(main())

    assert report.accepted == 6
    assert seconds >= 0.05


def test_gives_up(events: list[Event]) -> None:
    """After the last try an event is given up and reported, and the other events are not delayed by it."""
    attempts = plan(events, seed=1, distortions=PERFECT)
    poisonous = events[0].id

    report, receiver = run(attempts, lambda event, _number: 500 if event == poisonous else 200)

    assert report.never_accepted == [poisonous]
    assert receiver.posts.count(poisonous) == AT_ONCE.tries_max
    assert report.refused == {500: AT_ONCE.tries_max}
    assert report.accepted == len(events) - 1


def test_no_listener(events: list[Event]) -> None:
    """Where no server listens, every try is a connection error."""
    attempts = plan(events[:3], seed=1, distortions=PERFECT)

    async def main() -> DeliveryReport:
        server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return await deliver(attempts, url=f"http://127.0.0.1:{port}/", secret=SECRET, retries=AT_ONCE)

    report = asyncio.run(main())

    assert report.connection_errors == report.sent == 3 * AT_ONCE.tries_max
    assert report.never_accepted == [event.id for event in events[:3]]


def test_retries_grow_and_end() -> None:
    """The wait doubles up to a maximum; retries end after a number of tries or a time."""
    retries = Retries(tries_max=6, first_seconds=1, longest_seconds=5, total_seconds_max=100)

    assert [retries.wait_seconds(tries, 0) for tries in range(1, 7)] == [1, 2, 4, 5, 5, None]
    assert retries.wait_seconds(1, 99) == 1
    assert retries.wait_seconds(1, 99.5) is None
