"""The rules of money, each with the query that checks it."""
