"""What is asked of Stripe: queued calls, expiry, missed events, open sessions. Nothing here folds."""
