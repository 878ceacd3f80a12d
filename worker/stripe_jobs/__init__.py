"""Jobs that call Stripe: queued calls, expiry, missed events, open sessions. Nothing here folds."""
