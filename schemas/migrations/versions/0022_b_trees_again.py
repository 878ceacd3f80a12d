"""Objects and payment intents are found by B-trees again, and payloads are vacuumed soon.

Before a table has statistics, PostgreSQL takes any index that begins with account and mode for a better one than a hash
of the id alone, and reads all of it for each row. For the payloads see Note [Payloads are vacuumed while they are in
memory] in schemas/inbox.py, and for the indexes Note [Large indexes are built ahead] in schemas/migrate.py.
"""

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_COLUMNS = {
    "inbox_object": ("inbox", "object_id"),
    "orders_payment_intent": ("orders", "payment_intent"),
    "charges_payment_intent": ("charges", "payment_intent"),
}
BUILT = {
    f"{name}_of_0022": f"ON {table} (account, livemode, {column}) WHERE {column} IS NOT NULL"
    for name, (table, column) in _COLUMNS.items()
}
DROPPED = tuple(_COLUMNS)

_OF_EACH_PARTITION = """
DO $$
DECLARE partition regclass;
BEGIN
    FOR partition IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'payloads'::regclass LOOP
        EXECUTE format('ALTER TABLE %s {}', partition);
    END LOOP;
END $$
"""
_VACUUMED_SOON = """RESET (toast.autovacuum_vacuum_insert_threshold),
    SET (autovacuum_vacuum_insert_threshold = 10000, autovacuum_vacuum_insert_scale_factor = 0)
"""
_NOT_VACUUMED = """RESET (autovacuum_vacuum_insert_scale_factor),
    SET (autovacuum_vacuum_insert_threshold = -1, toast.autovacuum_vacuum_insert_threshold = -1)
"""


def upgrade() -> None:
    """Give the indexes that replace others their names, and set the partitions that are there."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    for name in _COLUMNS:
        op.execute(f"ALTER INDEX {name}_of_0022 RENAME TO {name}")
    op.execute(_OF_EACH_PARTITION.format(_VACUUMED_SOON))


def downgrade() -> None:
    """Make all as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_OF_EACH_PARTITION.format(_NOT_VACUUMED))
    for name, (table, column) in _COLUMNS.items():
        op.execute(f"DROP INDEX {name}")
        op.execute(f"CREATE INDEX {name} ON {table} USING hash ({column})")
