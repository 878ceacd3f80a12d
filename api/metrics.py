"""What is counted, in the format that Prometheus reads."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, generate_latest

registry: Final = CollectorRegistry()

DELIVERIES: Final = Counter(
    "payfold_deliveries", "Webhook deliveries answered, by what became of them.", ["outcome"], registry=registry
)
REFUSED: Final = Counter(
    "payfold_deliveries_refused", "Webhook deliveries turned away for good, by reason.", ["reason"], registry=registry
)


def exposition() -> bytes:
    """Return every counter of this process as text."""
    return generate_latest(registry)
