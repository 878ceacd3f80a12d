"""How Payfold is run: the command, the processes, embedded servers and the Stripe sandbox."""
