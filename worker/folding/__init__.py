"""From the inbox to the tables: the one writer of rows, changes and outcomes."""
