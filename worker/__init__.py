"""Folds the events of the inbox into the tables, and proves that the tables are right."""
