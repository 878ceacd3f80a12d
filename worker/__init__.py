"""Folds what the inbox holds into the tables, and proves that the tables are right."""
