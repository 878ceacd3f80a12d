"""Copies of one event: which is folded, and what contradicts it."""
