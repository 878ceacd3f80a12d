"""The sandbox Stripe behaves as Stripe does."""
