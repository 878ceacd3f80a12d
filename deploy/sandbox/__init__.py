"""A sandbox Stripe: the outside world that the demo, the tests and the benchmarks put Payfold in.

An :class:`Account` is a shop's Stripe account, seeded and deterministic: objects change as at Stripe, and every
change of which Stripe sends an event leaves a snapshot :class:`Event`. ``lives`` has the courses that objects may
take, ``history`` makes whole shops of those, ``rendering`` shows an event at an older API version, ``signing`` signs
as Stripe does, and ``delivery`` sends events to a webhook late, twice and out of order.

It knows nothing of Payfold, and imports nothing of it but the root of its tree of errors.
"""

from deploy.sandbox.account import (
    LATEST,
    START,
    Account,
    Event,
    ParameterError,
    SandboxError,
    TransitionError,
    UnknownObjectError,
)

__all__ = [
    "LATEST",
    "START",
    "Account",
    "Event",
    "ParameterError",
    "SandboxError",
    "TransitionError",
    "UnknownObjectError",
]
