"""Every error that Payfold raises on purpose.

The docstring of an error is its message to the person who meets it, and a command that it stops ends with 1, or as
noted. An error that only one room raises is defined there. A name with an underscore never leaves its module, and is
not drawn::

    PayfoldError
    ├── ConfigurationError          the process does not start (exit 2)
    ├── MigrationsPendingError      the schema is behind the code (exit 4)
    ├── NotFoundError               what a command was asked for is not there
    ├── ConflictError               the thing is there, but not in the state that the act needs
    │   └── CountDiffers            another number of things than was confirmed
    ├── CursorBeyond                the change feed has never given that number
    ├── KeyRefused                  Stripe takes none of our calls with this key: the job stops, and reports it
    ├── Permanent                   trying again gives the same answer
    │   ├── Refused                 not recorded: the answer names the reason
    │   │   ├── SignatureMissing, SignatureMalformed, SignatureMismatch, SignatureExpired
    │   │   └── BodyEmpty, BodyTooLarge, BodyTooSlow, BodyNotText, BodyNotJson, NotAnEvent
    │   ├── Unauthorized            no token that is known here: answered 401
    │   ├── LoginNeeded             a page, without a cookie that is known here: the login is shown
    │   ├── Unfoldable              recorded, then parked with this reason
    │   │   └── Archived
    │   ├── NotServed               no key of ours serves that account and mode, so Stripe is not called
    │   ├── MissingAtStripe         Stripe knows no such object
    │   ├── CallDeclined            Stripe understood the call and did not do it
    │   └── NotAnObject             what Stripe answered has nothing to record it by
    ├── Transient                   try again: nothing is lost, nothing is acknowledged
    │   ├── DatabaseAway
    │   ├── Overloaded              more arrives than can be taken
    │   ├── TooSlow                 the status took too long to read
    │   ├── RowRefused              PostgreSQL refused the row of this delivery
    │   ├── BrokerAway
    │   ├── BudgetSpent
    │   └── StripeAway              whether the call did anything is not known
    ├── ProcessLost                 a process that did a part of a rebuild was killed
    ├── NoRoomForFiles              the temporary disk is too full for a rebuild
    ├── ServicesError               the servers of `payfold up` cannot run
    │   ├── ServerMissing           no binary on this machine
    │   ├── ServerFailed            a server did not start
    │   │   └── PortTaken           another program was quicker to take the port
    │   ├── UserRefused             PostgreSQL cannot be run by this user
    │   ├── FolderInUse             another process owns the data folder
    │   └── FolderNotOurs           the data folder belongs to another user
    ├── StartError                  the processes of `payfold up` did not start
    │   └── PortLost                another program listens on the port of the web process
    ├── BenchError                  a figure cannot be measured
    │   ├── ApartError              a process that was to be measured failed
    │   └── LoadError               the load could not be sent
    └── SandboxError                what Stripe would refuse
        ├── TransitionError         the object's state does not allow it
        ├── ParameterError          a value is not accepted
        ├── UnknownObjectError      there is no such object
        └── ApiError                with the answer that Stripe would give
"""

from typing import ClassVar


class PayfoldError(Exception):
    """Something went wrong inside Payfold."""

    exit_code: ClassVar[int] = 1
    """What the command ends with."""

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or (type(self).__doc__ or "").strip())


class ConfigurationError(PayfoldError):
    """A setting is missing or cannot be used."""

    exit_code = 2


class MigrationsPendingError(PayfoldError):
    """The database schema is behind this release: run `payfold migrate up`."""

    exit_code = 4


class NotFoundError(PayfoldError):
    """There is nothing of that name here."""


class ConflictError(PayfoldError):
    """It is not in a state that allows this."""


class CountDiffers(ConflictError):
    """Another number of events matches than was confirmed."""

    def __init__(self, count: int, until: int) -> None:
        super().__init__(f"{count:,} events match now, and nothing was done: look at them, and confirm that number.")
        self.count = count
        self.until = until


class CursorBeyond(PayfoldError):
    """The cursor is beyond the last number that the change feed has given."""

    def __init__(self, after: int, last: int) -> None:
        super().__init__(
            f"The cursor {after} is beyond {last}, the last number that the change feed has given: the database was"
            f" probably restored from an older backup. Go on after {last}. What comes then may be what you have acted"
            " on before, so compare it by its subject_id and kind."
        )
        self.last = last


class Permanent(PayfoldError):
    """Trying again gives the same answer."""


class Refused(Permanent):
    """The delivery is not recorded."""

    status: ClassVar[int] = 400
    reason: ClassVar[str] = "refused"


class SignatureMissing(Refused):
    """The Stripe-Signature header is missing or empty."""

    reason = "signature_missing"


class SignatureMalformed(Refused):
    """The Stripe-Signature header cannot be read: it wants t=<unix seconds>,v1=<64 hexadecimal digits>."""

    reason = "signature_malformed"


class SignatureMismatch(Refused):
    """No v1 signature matches the body: check which endpoint's signing secret is configured."""

    reason = "signature_mismatch"


class SignatureExpired(Refused):
    """The signature's timestamp is too far from this server's clock."""

    reason = "signature_expired"


class BodyEmpty(Refused):
    """The request has no body."""

    reason = "body_empty"


class BodyTooLarge(Refused):
    """The body is larger than this endpoint reads."""

    status = 413
    reason = "body_too_large"


class BodyTooSlow(Refused):
    """The body did not arrive in time."""

    status = 408
    reason = "body_too_slow"


class BodyNotText(Refused):
    """The body is not UTF-8."""

    reason = "body_not_utf8"


class BodyNotJson(Refused):
    """The body is not JSON."""

    reason = "body_not_json"


class NotAnEvent(Refused):
    """The body is not an event: it wants an object with a text id and type and a created time."""

    reason = "not_an_event"


class Unfoldable(Permanent):
    """The event is kept, and cannot be folded."""


class Archived(Unfoldable):
    """The payload of an event of this object is archived: fold it with the archive at hand."""


class NotAnObject(Permanent):
    """Stripe's answer holds no object with a readable type and id, so there is nothing to record it by."""


class Transient(PayfoldError):
    """Try again later."""


class DatabaseAway(Transient):
    """PostgreSQL does not answer: the delivery is not recorded, send it again."""


class BrokerAway(Transient):
    """Redis does not answer, and with it the budget of calls to Stripe: try again."""


class BudgetSpent(Transient):
    """The budget of calls to Stripe is spent for now: try again in a while."""


class StripeAway(Transient):
    """Stripe does not answer, or not now: try again."""


class KeyRefused(PayfoldError):
    """Stripe refuses the API key: check STRIPE_API_KEY, and what a restricted key may do."""

    def __init__(self, detail: str | None = None, *, is_forbidden: bool = False) -> None:
        super().__init__(detail)
        self.is_forbidden = is_forbidden
        """Whether Stripe knows the key, and does not let it do this."""


class NotServed(Permanent):
    """No key in STRIPE_API_KEY serves this account and mode, so Stripe is not called."""


class MissingAtStripe(Permanent):
    """Stripe knows no such object in this account and mode."""


class CallDeclined(Permanent):
    """Stripe declined the call."""
