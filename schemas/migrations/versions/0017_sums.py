"""Hourly sums of orders, refunds and disputes, and the funnel's counts by payment link, kept by triggers.

See Note [Sums follow the rows] in schemas/summary.py.
"""

from alembic import op
from sqlalchemy import text

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE hourly_sums (
    account text NOT NULL,
    livemode boolean NOT NULL,
    subject text NOT NULL CONSTRAINT subject_is_known CHECK (subject IN ('order', 'refund', 'dispute')),
    hour timestamptz,
    status text,
    currency text,
    counted bigint NOT NULL,
    amount numeric NOT NULL,
    without_amount bigint NOT NULL
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX hourly_sums_key ON hourly_sums (hour, account, livemode, subject, status, currency)
    NULLS NOT DISTINCT;
CREATE TABLE hourly_deltas (
    account text NOT NULL,
    livemode boolean NOT NULL,
    subject text NOT NULL CONSTRAINT subject_is_known CHECK (subject IN ('order', 'refund', 'dispute')),
    hour timestamptz,
    status text,
    currency text,
    counted bigint NOT NULL,
    amount numeric NOT NULL,
    without_amount bigint NOT NULL
);
CREATE TABLE link_sums (
    account text NOT NULL,
    livemode boolean NOT NULL,
    payment_link text NOT NULL,
    currency text,
    opened bigint NOT NULL,
    completed bigint NOT NULL,
    paid bigint NOT NULL,
    expired bigint NOT NULL,
    amount_paid numeric NOT NULL,
    without_amount bigint NOT NULL
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX link_sums_key ON link_sums (account, livemode, payment_link, currency) NULLS NOT DISTINCT;
CREATE TABLE link_deltas (
    account text NOT NULL,
    livemode boolean NOT NULL,
    payment_link text NOT NULL,
    currency text,
    opened bigint NOT NULL,
    completed bigint NOT NULL,
    paid bigint NOT NULL,
    expired bigint NOT NULL,
    amount_paid numeric NOT NULL,
    without_amount bigint NOT NULL
);
-- They have no key, and a publication of all tables would refuse every change of a row.
ALTER TABLE hourly_sums REPLICA IDENTITY FULL;
ALTER TABLE hourly_deltas REPLICA IDENTITY FULL;
ALTER TABLE link_sums REPLICA IDENTITY FULL;
ALTER TABLE link_deltas REPLICA IDENTITY FULL;
"""

_HOURLY = "account, livemode, subject, hour, status, currency, counted, amount, without_amount"
_LINKS = "account, livemode, payment_link, currency, opened, completed, paid, expired, amount_paid, without_amount"
_READ = {
    # By table: the name of its rows in the sums, and the columns with their time and amount.
    "orders": ("order", "created", "amount_total"),
    "refunds": ("refund", "created", "amount"),
    "disputes": ("dispute", "as_of", "amount"),
}


_Rows = dict[str, int]
"""By the name of some rows: 1 where they are added, -1 where they are taken away."""


def _hourly(table: str, rows: _Rows) -> str:
    """Return the statement that adds what *rows* are to the hourly sums to the deltas."""
    subject, time, amount = _READ[table]
    counted = "sum(sign)"
    money = f"coalesce(sum(sign * {amount}::numeric) FILTER (WHERE currency IS NOT NULL), 0)"
    without = f"coalesce(sum(sign) FILTER (WHERE {amount} IS NULL OR currency IS NULL), 0)"
    return f"""
        INSERT INTO {{schema}}.hourly_deltas ({_HOURLY})
        SELECT account, livemode, '{subject}', date_trunc('hour', {time}, 'UTC'), status, currency,
            {counted}, {money}, {without}
        FROM ({_signed(rows, f"account, livemode, {time}, status, currency, {amount}")}) AS r
        GROUP BY account, livemode, date_trunc('hour', {time}, 'UTC'), status, currency
        HAVING ({counted}, {money}, {without}) <> (0, 0, 0);
    """  # noqa: S608 - our own constants


def _links(rows: _Rows) -> str:
    """Return the statement that adds what *rows* of orders are to the sums of their payment links to the deltas."""
    opened, completed = "sum(sign)", "coalesce(sum(sign) FILTER (WHERE completed_at IS NOT NULL), 0)"
    paid, expired = (f"coalesce(sum(sign) FILTER (WHERE status = '{word}'), 0)" for word in ("paid", "expired"))
    money = "coalesce(sum(sign * amount_total::numeric) FILTER (WHERE status = 'paid'), 0)"
    without = "coalesce(sum(sign) FILTER (WHERE status = 'paid' AND amount_total IS NULL), 0)"
    values = f"{opened}, {completed}, {paid}, {expired}, {money}, {without}"
    columns = "account, livemode, payment_link, currency, completed_at, status, amount_total"
    return f"""
        INSERT INTO {{schema}}.link_deltas ({_LINKS})
        SELECT account, livemode, payment_link, currency, {values}
        FROM ({_signed(rows, columns)}) AS r
        WHERE payment_link IS NOT NULL
        GROUP BY account, livemode, payment_link, currency
        HAVING ({values}) <> (0, 0, 0, 0, 0, 0);
    """  # noqa: S608 - our own constants


def _signed(rows: _Rows, columns: str) -> str:
    parts = (f"SELECT {sign} AS sign, {columns} FROM {source}" for source, sign in rows.items())  # noqa: S608 - as above
    return " UNION ALL ".join(parts)


def _all(table: str, rows: _Rows) -> str:
    return _hourly(table, rows) + (_links(rows) if table == "orders" else "")


# The share of the statements that add the deltas to the sums. With fewer a reader has more deltas to add up.
_MERGING = 0.05
_LOCKED = "pg_try_advisory_xact_lock(hashtextextended({lock}, 0))"
# Who writes rows need not own the tables, nor have rights on those of the sums, so the functions run as the owner. So
# that no one makes them call another function, or write another table, by the search path, it has only PostgreSQL's
# own names, and each of ours has its schema. Triggers fire without a right to call them.
_AS_OWNER = "LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp"
_MERGE = f"""
CREATE FUNCTION merge_sums() RETURNS void {_AS_OWNER} AS $$
BEGIN
    WITH taken AS (DELETE FROM {{schema}}.hourly_deltas RETURNING *)
    INSERT INTO {{schema}}.hourly_sums AS s ({_HOURLY})
    SELECT account, livemode, subject, hour, status, currency, sum(counted), sum(amount), sum(without_amount)
    FROM taken GROUP BY account, livemode, subject, hour, status, currency ORDER BY hour, account
    ON CONFLICT (hour, account, livemode, subject, status, currency) DO UPDATE SET
        counted = s.counted + excluded.counted, amount = s.amount + excluded.amount,
        without_amount = s.without_amount + excluded.without_amount;
    WITH taken AS (DELETE FROM {{schema}}.link_deltas RETURNING *)
    INSERT INTO {{schema}}.link_sums AS s ({_LINKS})
    SELECT account, livemode, payment_link, currency, sum(opened), sum(completed), sum(paid), sum(expired),
        sum(amount_paid), sum(without_amount)
    FROM taken GROUP BY account, livemode, payment_link, currency ORDER BY account, livemode, payment_link
    ON CONFLICT (account, livemode, payment_link, currency) DO UPDATE SET
        opened = s.opened + excluded.opened, completed = s.completed + excluded.completed,
        paid = s.paid + excluded.paid, expired = s.expired + excluded.expired,
        amount_paid = s.amount_paid + excluded.amount_paid,
        without_amount = s.without_amount + excluded.without_amount;
END
$$;
REVOKE EXECUTE ON FUNCTION merge_sums() FROM PUBLIC;
"""  # noqa: S608 - our own constants


def _function(table: str) -> str:
    """Return the function that every statement on *table* calls."""
    subject = _READ[table][0]
    links = "DELETE FROM {schema}.link_sums; DELETE FROM {schema}.link_deltas;" if table == "orders" else ""
    return f"""
CREATE FUNCTION sum_{table}() RETURNS trigger {_AS_OWNER} AS $$
BEGIN
    -- INSERT with ON CONFLICT fires for inserts and for updates, and most statements have only one of them.
    IF TG_OP = 'INSERT' THEN
        IF NOT EXISTS (SELECT FROM new_rows) THEN RETURN NULL; END IF;
        {_all(table, {"new_rows": 1})}
    ELSIF TG_OP = 'UPDATE' THEN
        IF NOT EXISTS (SELECT FROM new_rows) THEN RETURN NULL; END IF;
        {_all(table, {"new_rows": 1, "old_rows": -1})}
    ELSIF TG_OP = 'DELETE' THEN
        {_all(table, {"old_rows": -1})}
    ELSE
        PERFORM {_LOCKED.replace("try_", "")};
        DELETE FROM {{schema}}.hourly_sums WHERE subject = '{subject}';
        DELETE FROM {{schema}}.hourly_deltas WHERE subject = '{subject}';
        {links}
    END IF;
    IF random() < {_MERGING} AND {_LOCKED} THEN
        PERFORM {{schema}}.merge_sums();
    END IF;
    RETURN NULL;
END
$$;
REVOKE EXECUTE ON FUNCTION sum_{table}() FROM PUBLIC;
CREATE TRIGGER {table}_inserted AFTER INSERT ON {table} REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION sum_{table}();
CREATE TRIGGER {table}_updated AFTER UPDATE ON {table} REFERENCING NEW TABLE AS new_rows OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION sum_{table}();
CREATE TRIGGER {table}_deleted AFTER DELETE ON {table} REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION sum_{table}();
CREATE TRIGGER {table}_emptied AFTER TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION sum_{table}();
"""  # noqa: S608 - our own constants


_BACK = """
DROP FUNCTION sum_orders() CASCADE;
DROP FUNCTION sum_refunds() CASCADE;
DROP FUNCTION sum_disputes() CASCADE;
DROP FUNCTION merge_sums();
DROP TABLE hourly_sums, hourly_deltas, link_sums, link_deltas;
"""


def upgrade() -> None:
    """Make the tables and the triggers, and then, while no one writes the rows, fill the tables."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    # Waits until no one folds: a batch locks these tables in any order, so that the two could wait for each other.
    op.execute("SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || ' fold', 0))")
    named = "SELECT quote_ident(current_schema()), quote_literal(current_schema() || ' sums')"
    schema, lock = op.get_bind().execute(text(named)).one()
    op.execute(_TABLES + _MERGE.format(schema=schema))
    for table in _READ:
        op.execute(_function(table).format(schema=schema, lock=lock))
    for table in _READ:
        op.execute(_all(table, {table: 1}).format(schema=schema))
    op.execute("SELECT merge_sums()")


def downgrade() -> None:
    """Drop them."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_BACK)
