"""Fewer pages that a new event reads and that PostgreSQL logs whole.

Hash indexes take the place of the largest whose entries lie anywhere; they have a third of the pages, and the release
before finds the same rows by them. Payloads are not vacuumed while they come in: see Note [Payloads are not vacuumed
while they come in] in schemas/inbox.py. See Note [Large indexes are built ahead] in schemas/migrate.py.
"""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

_COLUMNS = {
    "inbox_object": ("inbox", "object_id"),
    "orders_payment_intent": ("orders", "payment_intent"),
    "charges_payment_intent": ("charges", "payment_intent"),
}
BUILT = {f"{name}_of_0021": f"ON {table} USING hash ({column})" for name, (table, column) in _COLUMNS.items()}
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
_NOT_VACUUMED = """SET (
    autovacuum_vacuum_insert_threshold = -1, toast.autovacuum_vacuum_insert_threshold = -1
), ALTER COLUMN seq SET STATISTICS 10, ALTER COLUMN payload SET STATISTICS 0
"""
_VACUUMED = """RESET (autovacuum_vacuum_insert_threshold, toast.autovacuum_vacuum_insert_threshold),
    ALTER COLUMN seq SET STATISTICS -1, ALTER COLUMN payload SET STATISTICS -1
"""


def upgrade() -> None:
    """Give the indexes that replace others their names, and set the partitions that are there."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    for name in _COLUMNS:
        op.execute(f"ALTER INDEX {name}_of_0021 RENAME TO {name}")
    op.execute(_OF_EACH_PARTITION.format(_NOT_VACUUMED))


def downgrade() -> None:
    """Make all as it was."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_OF_EACH_PARTITION.format(_VACUUMED))
    for name, (table, column) in _COLUMNS.items():
        op.execute(f"DROP INDEX {name}")
        op.execute(f"CREATE INDEX {name} ON {table} (account, livemode, {column}) WHERE {column} IS NOT NULL")
