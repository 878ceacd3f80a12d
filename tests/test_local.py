"""What `payfold up` and `payfold demo` do between the servers and the processes: the schema, and the port."""

import io

from sqlalchemy import Engine

from deploy import local
from schemas.settings import Settings
from tests import ledger

EVENT = b'{"id": "evt_1", "object": "event", "type": "coupon.created", "created": 1790000000, "data": {"object": {}}}'


def test_a_split_account_hinders_no_start(engine: Engine, database_url: str) -> None:
    """A label that splits an account is a warning of `up`: the rename that mends it needs the servers of `up`."""
    ledger.record(engine, [ledger.delivery(EVENT)])
    output = io.StringIO()

    local.migrate_here(
        Settings.load({"DATABASE_URL": database_url, "STRIPE_WEBHOOK_SECRETS": "acct_1=whsec_a"}), output
    )

    assert output.getvalue().startswith("Warning: Events were recorded without an account")
    assert output.getvalue().endswith("\n  payfold accounts rename '' acct_1 --yes\n")
