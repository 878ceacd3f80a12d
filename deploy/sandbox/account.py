"""A Stripe account of a shop: its objects, what may happen to them, and the events that Stripe sends of it.

Checkout Sessions go from open to complete or to expired and never back; payment links are switched on and
off. What Stripe would refuse is refused here, by a :class:`SandboxError`. A new kind of object is a shape in
``shapes.py``, a table of the account, and the methods that change it and end in ``_emit``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from deploy.sandbox import shapes
from deploy.sandbox.chance import Chance

LATEST: Final = "2026-10-28.endive"
START: Final = 1_793_491_200  # 2026-11-01T00:00:00Z
DAY_SECONDS: Final = 86_400
SESSION_SECONDS_MIN: Final = 1_800
SESSION_SECONDS_MAX: Final = DAY_SECONDS
RECOVERY_SECONDS: Final = 30 * DAY_SECONDS

Mode = Literal["payment", "setup", "subscription"]
PaymentStatus = Literal["paid", "unpaid", "no_payment_required"]

_AMOUNT = 2_000
_CURRENCY = "usd"
_NO_REQUEST: Final[dict[str, Any]] = {"id": None, "idempotency_key": None}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class SandboxError(Exception):
    """Something that Stripe would refuse."""


class TransitionError(SandboxError):
    """The object's state does not allow this. Contradictory events are made with ``Account.emit``."""


class ParameterError(SandboxError):
    """A parameter has a value that Stripe does not accept."""


class UnknownObjectError(SandboxError):
    """This account has no such object."""


@dataclass(frozen=True, slots=True)
class Event:
    """A snapshot event as one webhook endpoint receives it."""

    id: str
    type: str
    created: int
    """Unix seconds at Stripe."""
    livemode: bool
    account: str | None
    """The connected account that it is about; null for the account's own events."""
    api_version: str
    object_id: str
    body: bytes
    """The JSON exactly as delivered, and therefore as signed."""

    def payload(self) -> dict[str, Any]:
        """Return the event decoded, a fresh copy at every call."""
        payload: dict[str, Any] = _decode(self.body)
        return payload


def body_of(payload: dict[str, Any]) -> bytes:
    """Return *payload* in the layout of Stripe's webhooks: UTF-8 and indented by two spaces."""
    return msgspec.json.format(_encode(payload), indent=2)


def previous_attributes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the keys that *after* changes were in *before*.

    Nested objects tell only the keys that changed, arrays are told whole, and a key that is new was null.
    """
    previous: dict[str, Any] = {}
    for key in before.keys() | after.keys():
        was, now = before.get(key), after.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            previous[key] = previous_attributes(was, now)
        else:
            previous[key] = was
    return dict(sorted(previous.items()))


class Account:
    """One shop's Stripe account in one mode, with a clock of its own that moves only when told.

    The same seed and the same calls give the same events, byte by byte. Two accounts of one seed give the same
    ids (apart from the mode in a session's), which no receiver may trip over.
    """

    events: list[Event]
    """All events in true order."""
    now: int
    """Unix seconds."""

    def __init__(
        self,
        *,
        seed: int,
        start: int = START,
        livemode: bool = False,
        account: str | None = None,
        api_version: str = LATEST,
    ) -> None:
        self.events = []
        self.now = start
        self.livemode = livemode
        self.account = account
        self.api_version = api_version
        self._chance = Chance(f"account {seed}")
        self._sessions: dict[str, dict[str, Any]] = {}
        self._links: dict[str, dict[str, Any]] = {}
        self._link_amounts: dict[str, int] = {}
        # What a session's object does not say: that its payment failed, and what its buyer is shown.
        self._failed: set[str] = set()
        self._presentments: dict[str, tuple[str, int]] = {}

    def advance(self, seconds: int) -> None:
        """Move the clock forward. Nothing happens by itself: a session past its time expires when told."""
        if seconds < 0:
            raise ParameterError("time does not run backwards")
        self.now += seconds

    def take_events(self) -> list[Event]:
        """Return the events since the last call and forget them: a long history then needs little memory."""
        taken, self.events = self.events, []
        return taken

    # Payment links.

    def create_payment_link(
        self, *, currency: str = _CURRENCY, amount: int = _AMOUNT, metadata: Mapping[str, str] | None = None
    ) -> str:
        """Create an active link that sells one thing for *amount* minor units, and return its id."""
        link = self._chance.id("plink")
        self._link_amounts[link] = amount
        self._links[link] = shapes.payment_link(
            {
                "id": link,
                "currency": currency,
                "livemode": self.livemode,
                "metadata": dict(metadata or {}),
                "url": f"https://buy.stripe.com/{'' if self.livemode else 'test_'}{self._chance.token(18)}",
            }
        )
        self._emit("payment_link.created", self._links[link], request=self._request())
        return link

    def update_payment_link(
        self, link: str, *, active: bool | None = None, metadata: Mapping[str, str | None] | None = None
    ) -> None:
        """Change a link; metadata is merged, and a null or empty value removes its key.

        An update that changes nothing has no event.
        """
        before = self._link(link)
        after = dict(before)
        if active is not None:
            after["active"] = active
        if metadata is not None:
            merged = before["metadata"] | dict(metadata)
            after["metadata"] = {key: value for key, value in merged.items() if value}
        previous = previous_attributes(before, after)
        if previous:
            self._links[link] = after
            self._emit("payment_link.updated", after, previous, request=self._request())

    def payment_link(self, link: str) -> dict[str, Any]:
        """Return a link as the API does now."""
        return _copy(self._link(link))

    # Checkout Sessions.

    def open_session(  # noqa: PLR0913 (each is one of Stripe's own parameters, and all have defaults)
        self,
        *,
        mode: Mode = "payment",
        amount: int | None = None,
        currency: str | None = None,
        payment_link: str | None = None,
        customer: str | None = None,
        client_reference_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        discount: int = 0,
        shipping: int = 0,
        tax: int = 0,
        expires_in: int = SESSION_SECONDS_MAX,
        recoverable: bool = False,
        recovered_from: str | None = None,
        presentment: tuple[str, int] | None = None,
    ) -> str:
        """Open a session and return its id. Stripe sends no event of it.

        *amount* is the subtotal, to which *shipping* and *tax* are added and from which *discount* is taken, all
        in minor units; amount and currency default to the payment link's, or to 20 dollars. *expires_in* is in
        seconds. *presentment* is the currency and the total that the buyer is shown; the session tells it once
        complete.
        """
        if not SESSION_SECONDS_MIN <= expires_in <= SESSION_SECONDS_MAX:
            raise ParameterError("a session expires between 30 minutes and 24 hours after its creation")
        if recovered_from is not None:
            self._require_status(recovered_from, "expired", "recovered")
        sold, copied = self._sold_by(payment_link)
        fields: dict[str, Any] = {
            "mode": mode,
            "payment_link": payment_link,
            "customer": customer,
            "client_reference_id": client_reference_id,
            "metadata": copied | dict(metadata or {}),
            "recovered_from": recovered_from,
        }
        if customer is not None:
            fields["customer_details"] = shapes.customer_details(self._chance.email(), None, None)
            fields["customer_creation"] = None
        if recoverable:
            fields["after_expiration"] = shapes.recovery(None, None)
        if mode == "setup":
            fields |= self._setup_fields()
        else:
            sold_amount = sold["amount"] if amount is None else amount
            fields |= self._priced_fields(sold_amount, discount, shipping, tax)
            fields["currency"] = currency or sold["currency"]
            if mode == "subscription" and fields["amount_total"] == 0:
                fields["payment_status"] = "no_payment_required"  # a trial
        session = self._open(fields, expires_in)
        if presentment is not None:
            self._presentments[session] = presentment
        return session

    def complete(self, session: str, *, payment_status: PaymentStatus | None = None) -> None:
        """Let the buyer finish the page.

        *payment_status* is paid, unpaid (a delayed method, still processing) or, exactly when nothing is due,
        no_payment_required; by default what an instant method gives.
        """
        current = self._require_status(session, "open", "completed")
        if self.now > current["expires_at"]:
            raise TransitionError(f"{session} is past its expires_at and can only expire")
        due = current["amount_total"]
        if payment_status is None:
            payment_status = "paid" if due else "no_payment_required"
        if (payment_status == "no_payment_required") == bool(due):
            raise TransitionError(f"{session} has {due} due, so it cannot complete as {payment_status}")
        name, address = self._chance.person()
        email = (current["customer_details"] or {}).get("email") or self._chance.email()
        current |= {
            "collected_information": {
                "business_name": None,
                "individual_name": None,
                "shipping_details": {"address": address, "name": name} if current["shipping_cost"] else None,
            },
            "customer_details": shapes.customer_details(email, name, address),
            "payment_status": payment_status,
            "status": "complete",
            "url": None,
        }
        if current["mode"] == "subscription":
            current["customer"] = current["customer"] or self._chance.short_id("cus")
            current["subscription"] = self._chance.id("sub")
            current["invoice"] = self._chance.id("in")
        elif due:
            current["payment_intent"] = f"pi_3{self._chance.token(23)}"
        if session in self._presentments:
            shown_currency, shown_amount = self._presentments[session]
            current["presentment_details"] = {
                "presentment_amount": shown_amount,
                "presentment_currency": shown_currency,
            }
        self._emit("checkout.session.completed", current)

    def async_payment_succeeded(self, session: str) -> None:
        """Let a delayed payment clear."""
        current = self._require_processing(session)
        current["payment_status"] = "paid"
        self._emit("checkout.session.async_payment_succeeded", current)

    def async_payment_failed(self, session: str) -> None:
        """Let a delayed payment fail. The object does not show it: only the event's type does."""
        current = self._require_processing(session)
        self._failed.add(session)
        self._emit("checkout.session.async_payment_failed", current)

    def expire(self, session: str) -> None:
        """Expire a session: Stripe's timer if its time has come, else a call of the shop.

        ``expires_at`` stays as it was. A recoverable session gets its recovery url for 30 days, and tells the
        email of some buyers, who have consented to be written to.
        """
        current = self._require_status(session, "open", "expired")
        current["status"] = "expired"
        current["url"] = None
        if current["after_expiration"] is not None:
            kind = "live" if self.livemode else "test"
            url = f"https://buy.stripe.com/r/{kind}_{self._chance.token(60)}"
            current["after_expiration"] = shapes.recovery(url, self.now + RECOVERY_SECONDS)
            if current["customer_details"] is None and self._chance.flip(0.5):
                current["consent"] = {"promotions": "opt_in", "terms_of_service": None}
                current["customer_details"] = shapes.customer_details(self._chance.email(), None, None)
        by_timer = self.now >= current["expires_at"]
        self._emit("checkout.session.expired", current, request=_NO_REQUEST if by_timer else self._request())

    def recover(self, session: str) -> str:
        """Let a buyer follow an expired session's recovery url, and return the new session that this opens.

        The original stays expired for ever, and may be recovered again.
        """
        original = self._require_status(session, "expired", "recovered")
        after_expiration = original["after_expiration"]
        if after_expiration is None:
            raise TransitionError(f"{session} was not opened as recoverable")
        if self.now > after_expiration["recovery"]["expires_at"]:
            raise TransitionError(f"the recovery url of {session} is no longer valid")
        # A guest may type another address this time.
        guest = original["customer"] is None
        copy = original | {
            "after_expiration": shapes.recovery(None, None),
            "consent": None,
            "customer_details": None if guest else original["customer_details"],
            "recovered_from": session,
            "status": "open",
        }
        return self._open(copy, original["expires_at"] - original["created"])

    def session(self, session: str) -> dict[str, Any]:
        """Return a session as the API does now, without the line items, which want expanding."""
        return _copy(self._session(session))

    def session_ids(self) -> list[str]:
        """Return all sessions, in the order in which they were opened."""
        return list(self._sessions)

    def payment_link_ids(self) -> list[str]:
        """Return all payment links, in the order of their creation."""
        return list(self._links)

    def expected_status(self, session: str) -> str:
        """Return the truth of an order: open, processing, paid, failed, expired, or complete in setup mode.

        Events made with :meth:`emit` do not change it.
        """
        current = self._session(session)
        if current["status"] != "complete":
            return str(current["status"])
        if current["mode"] == "setup":
            return "complete"
        if current["payment_status"] == "unpaid":
            return "failed" if session in self._failed else "processing"
        return "paid"

    # Events.

    def emit(
        self,
        type: str,  # noqa: A002 (Stripe's name of it)
        object: dict[str, Any],  # noqa: A002 (Stripe's name of it)
        previous_attributes: dict[str, Any] | None = None,
        created: int | None = None,
    ) -> Event:
        """Emit any snapshot event, however contradictory. The account's own objects stay as they are."""
        return self._emit(type, object, previous_attributes, created=created)

    def _emit(
        self,
        event_type: str,
        snapshot: dict[str, Any],
        previous: dict[str, Any] | None = None,
        *,
        created: int | None = None,
        request: dict[str, Any] = _NO_REQUEST,
    ) -> Event:
        data = {"object": snapshot}
        if previous is not None:
            data["previous_attributes"] = previous
        event_id = self._chance.event_id()
        created = self.now if created is None else created
        payload = shapes.envelope(
            account=self.account,
            api_version=self.api_version,
            created=created,
            data=data,
            event_id=event_id,
            event_type=event_type,
            livemode=self.livemode,
            request=request,
        )
        event = Event(
            id=event_id,
            type=event_type,
            created=created,
            livemode=self.livemode,
            account=self.account,
            api_version=self.api_version,
            object_id=str(snapshot.get("id")),
            body=body_of(payload),
        )
        self.events.append(event)
        return event

    def _request(self) -> dict[str, Any]:
        """Return the ``request`` of an event that a call of the shop caused."""
        return {"id": self._chance.short_id("req"), "idempotency_key": self._chance.idempotency_key()}

    # How sessions begin.

    def _open(self, fields: dict[str, Any], expires_in: int) -> str:
        session = self._chance.session_id(livemode=self.livemode)
        # The fragment is what lets its holder see the page: a credential, here as long as a real one.
        url = f"https://checkout.stripe.com/c/pay/{session}#fid{self._chance.token(180)}"
        timed = {"created": self.now, "expires_at": self.now + expires_in, "livemode": self.livemode}
        self._sessions[session] = shapes.checkout_session(fields | {"id": session, "url": url} | timed)
        return session

    def _sold_by(self, link: str | None) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the price (amount, currency) and the metadata that a session takes from its link."""
        if link is None:
            return {"amount": _AMOUNT, "currency": _CURRENCY}, {}
        definition = self._link(link)
        if not definition["active"]:
            raise TransitionError(f"{link} is not active")
        price = {"amount": self._link_amounts[link], "currency": definition["currency"]}
        return price, definition["metadata"]

    def _priced_fields(self, amount: int, discount: int, shipping: int, tax: int) -> dict[str, Any]:
        if min(amount, discount, shipping, tax, amount - discount) < 0:
            raise ParameterError("amounts are not negative, and a discount is at most the subtotal")
        fields: dict[str, Any] = {
            "amount_subtotal": amount,
            "amount_total": amount - discount + shipping + tax,
            "total_details": {"amount_discount": discount, "amount_shipping": shipping, "amount_tax": tax},
        }
        if discount:
            fields["discounts"] = [{"coupon": self._chance.token(8), "promotion_code": None}]
        if shipping:
            fields["shipping_address_collection"] = shapes.SHIPPING_COUNTRIES
            fields["shipping_cost"] = {
                "amount_subtotal": shipping,
                "amount_tax": 0,
                "amount_total": shipping,
                "shipping_rate": self._chance.id("shr"),
            }
        return fields

    def _setup_fields(self) -> dict[str, Any]:
        return {
            "payment_method_collection": "always",
            "payment_status": "no_payment_required",
            "setup_intent": self._chance.id("seti"),
        }

    # What may happen when.

    def _link(self, link: str) -> dict[str, Any]:
        try:
            return self._links[link]
        except KeyError:
            raise UnknownObjectError(f"No such payment_link: {link!r}") from None

    def _session(self, session: str) -> dict[str, Any]:
        try:
            return self._sessions[session]
        except KeyError:
            raise UnknownObjectError(f"No such checkout.session: {session!r}") from None

    def _require_status(self, session: str, status: str, wish: str) -> dict[str, Any]:
        current = self._session(session)
        if current["status"] != status:
            raise TransitionError(
                f'Only Checkout Sessions with a status in ["{status}"] can be {wish}. '
                f"This Checkout Session has a status of `{current['status']}`."
            )
        return current

    def _require_processing(self, session: str) -> dict[str, Any]:
        current = self._session(session)
        if self.expected_status(session) != "processing":
            raise TransitionError(f"{session} is {self.expected_status(session)}, no payment is processing")
        return current


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = _decode(_encode(value))
    return copied
