"""The ground floor: every shape that crosses a boundary, and the doors to PostgreSQL and the broker.

Nothing in here imports ``api``, ``worker`` or ``deploy``.
"""
