"""Are the tables right? Money's rules, a rebuild, other logs, Stripe itself; and an explanation of any row."""
