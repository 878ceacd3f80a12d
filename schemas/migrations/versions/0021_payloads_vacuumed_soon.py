"""Payloads are vacuumed soon: see Note [Payloads are vacuumed while they are in memory] in schemas/inbox.py."""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

_OF_EACH_PARTITION = """
DO $$
DECLARE partition regclass;
BEGIN
    FOR partition IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'payloads'::regclass LOOP
        EXECUTE format('ALTER TABLE %s {}', partition);
    END LOOP;
END $$
"""
_VACUUMED_SOON = """SET (autovacuum_vacuum_insert_threshold = 10000, autovacuum_vacuum_insert_scale_factor = 0),
    ALTER COLUMN seq SET STATISTICS 10, ALTER COLUMN payload SET STATISTICS 0
"""
_AS_USUAL = """RESET (autovacuum_vacuum_insert_threshold, autovacuum_vacuum_insert_scale_factor),
    ALTER COLUMN seq SET STATISTICS -1, ALTER COLUMN payload SET STATISTICS -1
"""


def upgrade() -> None:
    """Set the partitions that are there."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_OF_EACH_PARTITION.format(_VACUUMED_SOON))


def downgrade() -> None:
    """Make them as they were."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(_OF_EACH_PARTITION.format(_AS_USUAL))
