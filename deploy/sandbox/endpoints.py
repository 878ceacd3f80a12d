"""Webhook endpoints: where Stripe sends which events. Their secret is answered once, at their creation.

They have no events. Source: https://docs.stripe.com/api/webhook_endpoints.
"""

from collections.abc import Sequence
from typing import Final

from deploy.sandbox.journal import Journal, Object, ParameterError

ENDPOINTS_MAX: Final = 16
KIND: Final = "webhook_endpoint"


class Endpoints(Journal):
    """The account's webhook endpoints."""

    def create_webhook_endpoint(
        self, url: str, enabled_events: Sequence[str], *, api_version: str | None = None, description: str | None = None
    ) -> Object:
        """Create an enabled endpoint and return it with its secret, which no later answer holds."""
        scheme = url.partition("://")[0]
        if scheme not in {"http", "https"} or (self.livemode and scheme != "https"):
            raise ParameterError("Invalid URL: URL must be publicly accessible, and in live mode begin with https")
        if not enabled_events:
            raise ParameterError("Missing required param: enabled_events.")
        if len(self.object_ids(KIND)) >= ENDPOINTS_MAX:
            raise ParameterError(f"You have reached the maximum of {ENDPOINTS_MAX} webhook endpoints.")
        endpoint: Object = {
            "id": self._chance.id("we"),
            "object": KIND,
            "api_version": api_version,
            "application": None,
            "created": self.now,
            "description": description,
            "enabled_events": list(enabled_events),
            "livemode": self.livemode,
            "metadata": {},
            "status": "enabled",
            "url": url,
        }
        self._store(endpoint)
        return {**endpoint, "secret": f"whsec_{self._chance.token(32)}"}

    def update_webhook_endpoint(self, endpoint: str, enabled_events: Sequence[str]) -> None:
        """Let an endpoint have these event types in place of its own, as the API does."""
        found = self._find(KIND, endpoint)
        if not enabled_events:
            raise ParameterError("Missing required param: enabled_events.")
        self._change(found, enabled_events=list(enabled_events))

    def disable_webhook_endpoint(self, endpoint: str) -> None:
        """Let an endpoint rest, as the Dashboard does."""
        self._change(self._find(KIND, endpoint), status="disabled")
