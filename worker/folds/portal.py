"""Folds billing portal events into portal configurations and sessions.

Source: https://docs.stripe.com/api/customer_portal/configurations/object and
https://docs.stripe.com/api/customer_portal/sessions/object. A configuration carries the time of its last update. A
session's url is a credential, so it is never read. Stripe sends no event when a session ends.
"""

from typing import Any, Final

from msgspec import UNSET, Struct, UnsetType

from schemas import contents
from schemas.own_events import PORTAL_SESSION_CLOCK_EXPIRED, PORTAL_SESSION_OBSERVED, observed
from worker.folds.facts import Event, Facts, Row, Value
from worker.folds.join import RowSpec
from worker.folds.reading import Name, Reader, Reference, Reported, Seconds, carried, make_facts, moment, references

CONFIGURATION_TYPES: Final = (
    "billing_portal.configuration.created",
    "billing_portal.configuration.updated",
    observed("billing_portal.configuration"),
)
SESSION_TYPES: Final = (
    "billing_portal.session.created",
    PORTAL_SESSION_OBSERVED,
    PORTAL_SESSION_CLOCK_EXPIRED,
)


class _LoginPage(Struct):
    url: str | UnsetType | None = UNSET


class Configuration(Struct):
    """The fields of a portal configuration that are kept."""

    id: Name
    active: bool | UnsetType | None = UNSET
    created: Seconds | UnsetType | None = UNSET
    features: dict[str, Any] | UnsetType | None = UNSET
    is_default: bool | UnsetType | None = UNSET
    login_page: _LoginPage | UnsetType | None = UNSET
    name: str | UnsetType | None = UNSET
    updated: Seconds | UnsetType | None = UNSET


class _Flow(Struct):
    type: str | None = None


class Session(Struct):
    """The fields of a portal session that are kept."""

    id: Name
    configuration: Reference | UnsetType = UNSET
    created: Seconds | UnsetType | None = UNSET
    customer: Reference | UnsetType = UNSET
    flow: _Flow | UnsetType | None = UNSET
    return_url: str | UnsetType | None = UNSET


_configurations = Reader(Configuration)
_sessions = Reader(Session)


def fold_configuration(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``CONFIGURATION_TYPES``, about its configuration.

    Raises:
        Unfoldable: when the configuration in it cannot be read.
    """
    configuration, before = _configurations.read(event.payload)
    updated = moment(configuration.updated)
    stamp = (updated if isinstance(updated, type(event.created)) else event.created, event.created)
    reported = None if before is None else _configuration_reported(before)
    after = _configuration_reported(configuration)
    return (make_facts(event, "portal_configurations", configuration.id, after=after, before=reported, stamp=stamp),)


def _configuration_reported(configuration: Configuration) -> Reported:
    page = configuration.login_page
    return Reported(
        carried(
            active=configuration.active,
            is_default=configuration.is_default,
            name=configuration.name,
            features=_plain(configuration.features),
            login_page_url=page.url if isinstance(page, _LoginPage) else page,
            created=moment(configuration.created),
            updated=moment(configuration.updated),
        )
    )


OBJECTS: Final = (
    *("features", "customer_update", "invoice_history", "payment_method_update", "subscription_cancel"),
    *(
        "subscription_pause",
        "subscription_update",
        "cancellation_reason",
        "schedule_at_period_end",
        "adjustable_quantity",
    ),
)
"""The objects among the features. Any other empty value in the features is a list."""


def _plain(value: Any, name: str = "features") -> Any:  # noqa: ANN401 - any JSON
    """Return *value*, of the key *name*, in one form for all ways to write it: see schemas/contents.py."""
    if isinstance(value, (dict, list)) and not value:
        return {} if name in OBJECTS else []
    if isinstance(value, dict):
        return {key: _plain(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return contents.whole(value)


def _stamp_of(row: Row) -> tuple[Value, ...]:
    # An event without the key ``updated`` is stamped with its own time. The row does not show which of the two times
    # the stamp was, so the later one is taken: it is never below the true stamp.
    updated, as_of = row["updated"], row["as_of"]
    return (max(updated, as_of) if updated is not None else as_of, as_of)  # type: ignore[type-var]  # both are times


CONFIGURATION_SPEC: Final = RowSpec(
    table="portal_configurations",
    subject="portal_configuration",
    empty=dict.fromkeys(("active", "is_default", "name", "features", "login_page_url", "created", "updated")),
    stamp_of=_stamp_of,
)


def fold_session(event: Event) -> tuple[Facts, ...]:
    """Return the facts of *event*, of one of ``SESSION_TYPES``, about its portal session.

    Raises:
        Unfoldable: when the session in it cannot be read.
    """
    session, _ = _sessions.read(event.payload)
    by_clock = event.type == PORTAL_SESSION_CLOCK_EXPIRED
    flow = session.flow.type if isinstance(session.flow, _Flow) else session.flow
    reported = Reported(
        carried(flow_type=flow, return_url=session.return_url, created=moment(session.created)),
        references(configuration=session.configuration, customer=session.customer),
    )
    # Only our clock ever reports the end of a portal session, so that moment is never corrected.
    moments = {"expired_at": event.created} if by_clock else {}
    return (
        make_facts(
            event, "portal_sessions", session.id, after=reported, before=None, rank=int(by_clock), moments=moments
        ),
    )


SESSION_SPEC: Final = RowSpec(
    table="portal_sessions",
    subject="portal_session",
    empty=dict.fromkeys(("configuration", "customer", "flow_type", "return_url", "created", "expired_at")),
    rank_of=lambda row: int(row["expired_at"] is not None),
)
