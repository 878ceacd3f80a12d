"""Tests that the sandbox behaves as Stripe does."""
