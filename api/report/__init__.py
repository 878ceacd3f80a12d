"""The page of a reconciliation."""
