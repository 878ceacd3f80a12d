"""The billing portal: its configurations, and the sessions in which customers use it.

A configuration is the only object with a time at which it was ``updated``. A session has one event, at its creation,
and anyone who has its url can enter.
"""

from collections.abc import Mapping
from typing import Any

from deploy.sandbox import billing_shapes
from deploy.sandbox.customers import Customers
from deploy.sandbox.journal import Object, ParameterError, TransitionError, api_call, merged_metadata


class Portal(Customers):
    """Portal configurations and sessions."""

    @api_call
    def create_portal_configuration(
        self, *, name: str | None = None, is_default: bool = False, default_return_url: str | None = None
    ) -> str:
        """Create an active configuration and return its id."""
        configuration = billing_shapes.portal_configuration(
            {
                "id": self._chance.id("bpc"),
                "created": self.now,
                "default_return_url": default_return_url,
                "is_default": is_default,
                "livemode": self.livemode,
                "name": name,
                "updated": self.now,
            }
        )
        self._store(configuration)
        self._emit("billing_portal.configuration.created", configuration)
        return str(configuration["id"])

    @api_call
    def update_portal_configuration(
        self,
        configuration: str,
        /,
        *,
        features: Mapping[str, Mapping[str, Any]] | None = None,
        login_page: bool | None = None,
        metadata: Mapping[str, str | None] | None = None,
        **fields: Any,  # noqa: ANN401 (JSON values)
    ) -> None:
        """Change a configuration's active, name, default_return_url, login page, metadata or *features*.

        In each feature only the given keys are changed. An update that changes nothing has no event.
        """
        if unknown := fields.keys() - {"active", "name", "default_return_url"}:
            raise ParameterError(f"Received unknown parameters: {', '.join(sorted(unknown))}")
        before = self._find("billing_portal.configuration", configuration)
        if before["is_default"] and fields.get("active") is False:
            raise TransitionError(f"{configuration} is the default configuration and cannot be deactivated")
        if features is not None:
            changed = {feature: before["features"][feature] | dict(values) for feature, values in features.items()}
            fields["features"] = before["features"] | changed
        if login_page is not None:
            fields["login_page"] = self._login_page(before["login_page"], enabled=login_page)
        if metadata is not None:
            fields["metadata"] = merged_metadata(before["metadata"], metadata)
        if all(before[key] == value for key, value in fields.items()):
            return
        after, previous = self._change(before, **fields, updated=self.now)
        self._emit("billing_portal.configuration.updated", after, previous)

    def _login_page(self, before: Object, *, enabled: bool) -> Object:
        if before["enabled"] == enabled:
            return before
        return {
            "enabled": enabled,
            "url": f"https://billing.stripe.com/p/login/{self._chance.token(16)}" if enabled else None,
        }

    @api_call
    def create_portal_session(
        self,
        customer: str,
        *,
        configuration: str | None = None,
        flow: str | None = None,
        return_url: str | None = "https://shop.example.com/account",
    ) -> str:
        """Create a portal session for a customer and return its id; *flow* is the type of the one thing to do there.

        Without *configuration* it is the default one's.
        """
        self._customer(customer)
        used = self._find("billing_portal.configuration", configuration or self._default_configuration())
        if not used["active"]:
            raise TransitionError(f"{used['id']} is not active")
        session = billing_shapes.portal_session(
            {
                "id": self._chance.id("bps"),
                "configuration": used["id"],
                "created": self.now,
                "customer": customer,
                "flow": None if flow is None else billing_shapes.portal_flow(flow),
                "livemode": self.livemode,
                "return_url": return_url,
                # The last part lets its holder in: a credential.
                "url": f"https://billing.stripe.com/p/session/{self._chance.token(84)}",
            }
        )
        self._store(session)
        self._emit("billing_portal.session.created", session)
        return str(session["id"])

    def _default_configuration(self) -> str:
        """Return the default configuration, which comes to be with the first session that needs one."""
        for configuration in self.object_ids("billing_portal.configuration"):
            if self._find("billing_portal.configuration", configuration)["is_default"]:
                return configuration
        return self.create_portal_configuration(is_default=True)
