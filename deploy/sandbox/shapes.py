"""The shapes of Stripe's objects: every field of API version 2026-10-28.endive, null where Stripe has null.

The shapes know nothing of time or state. Nested values of a shape are shared between objects and never changed
in place: a change of an object replaces the value of a top-level key.
"""

from typing import Any, Final

# Keys in Stripe's order: id, object, then the alphabet.
_CHECKOUT_SESSION: Final[dict[str, Any]] = {
    "id": None,
    "object": "checkout.session",
    "adaptive_pricing": {"enabled": True},
    "after_expiration": None,
    "allow_promotion_codes": None,
    "allowed_payment_method_types": None,
    "amount_subtotal": None,
    "amount_total": None,
    "automatic_tax": {"enabled": False, "liability": None, "provider": None, "status": None},
    "billing_address_collection": None,
    "branding_settings": {
        "background_color": "#ffffff",
        "border_style": "rounded",
        "button_color": "#0074d4",
        "display_name": "Sandbox shop",
        "font_family": "default",
        "icon": None,
        "logo": None,
    },
    "cancel_url": None,
    "client_reference_id": None,
    "client_secret": None,
    "collected_information": None,
    "consent": None,
    "consent_collection": None,
    "created": None,
    "currency": None,
    "currency_conversion": None,
    "custom_fields": [],
    "custom_text": {
        "after_submit": None,
        "shipping_address": None,
        "submit": None,
        "terms_of_service_acceptance": None,
    },
    "customer": None,
    "customer_account": None,
    "customer_creation": "if_required",
    "customer_details": None,
    "customer_email": None,
    "discounts": [],
    "excluded_payment_method_types": None,
    "expires_at": None,
    "integration_identifier": None,
    "invoice": None,
    "invoice_creation": {
        "enabled": False,
        "invoice_data": {
            "account_tax_ids": None,
            "custom_fields": None,
            "description": None,
            "footer": None,
            "issuer": None,
            "metadata": {},
            "rendering_options": None,
        },
    },
    "livemode": None,
    "locale": None,
    "managed_payments": {"enabled": False},
    "metadata": {},
    "mode": "payment",
    "origin_context": None,
    "payment_intent": None,
    "payment_link": None,
    "payment_method_collection": "if_required",
    "payment_method_configuration_details": None,
    "payment_method_options": {"card": {"request_three_d_secure": "automatic"}},
    "payment_method_types": ["card", "klarna", "link", "sepa_debit", "us_bank_account"],
    "payment_status": "unpaid",
    "permissions": None,
    "phone_number_collection": {"enabled": False},
    "recovered_from": None,
    "saved_payment_method_options": None,
    "setup_intent": None,
    "shipping_address_collection": None,
    "shipping_cost": None,
    "shipping_options": [],
    "status": "open",
    "submit_type": None,
    "subscription": None,
    "success_url": "https://shop.example.com/thanks?session={CHECKOUT_SESSION_ID}",
    "total_details": None,
    "ui_mode": "hosted_page",
    "url": None,
    "wallet_options": None,
}

_PAYMENT_LINK: Final[dict[str, Any]] = {
    "id": None,
    "object": "payment_link",
    "active": True,
    "after_completion": {"hosted_confirmation": {"custom_message": None}, "type": "hosted_confirmation"},
    "allow_promotion_codes": False,
    "application": None,
    "application_fee_amount": None,
    "application_fee_percent": None,
    "automatic_tax": {"enabled": False, "liability": None},
    "billing_address_collection": "auto",
    "consent_collection": None,
    "currency": None,
    "custom_fields": [],
    "custom_text": {
        "after_submit": None,
        "shipping_address": None,
        "submit": None,
        "terms_of_service_acceptance": None,
    },
    "customer_creation": "if_required",
    "inactive_message": None,
    "invoice_creation": {
        "enabled": False,
        "invoice_data": {
            "account_tax_ids": None,
            "custom_fields": None,
            "description": None,
            "footer": None,
            "issuer": None,
            "metadata": {},
            "rendering_options": None,
        },
    },
    "livemode": None,
    "managed_payments": {"enabled": False},
    "metadata": {},
    "on_behalf_of": None,
    "optional_items": None,
    "payment_intent_data": None,
    "payment_method_collection": "always",
    "payment_method_options": None,
    "payment_method_types": None,
    "phone_number_collection": {"enabled": False},
    "restrictions": None,
    "shipping_address_collection": None,
    "shipping_options": [],
    "submit_type": "auto",
    "subscription_data": {
        "description": None,
        "invoice_settings": {"issuer": {"type": "self"}},
        "metadata": {},
        "trial_period_days": None,
        "trial_settings": None,
    },
    "tax_id_collection": {"enabled": False, "required": "never"},
    "transfer_data": None,
    "url": None,
}

INVOICE_CREATION: Final[dict[str, Any]] = {**_CHECKOUT_SESSION["invoice_creation"], "enabled": True}
SHIPPING_COUNTRIES: Final[dict[str, Any]] = {"allowed_countries": ["DE", "GB", "JP", "KW", "US"]}
ANONYMOUS_ADDRESS: Final[dict[str, Any]] = dict.fromkeys(("city", "country", "line1", "line2", "postal_code", "state"))


def checkout_session(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a Checkout Session with *fields* laid over the defaults: open, hosted, payment mode, unpaid."""
    return {**_CHECKOUT_SESSION, **fields}


def payment_link(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a payment link with *fields* laid over the defaults: active, without metadata."""
    return {**_PAYMENT_LINK, **fields}


def customer_details(email: str | None, name: str | None, address: dict[str, Any] | None) -> dict[str, Any]:
    """Return a session's ``customer_details``; on an expired session only the email is known, if anything."""
    return {
        "address": address or ANONYMOUS_ADDRESS,
        "business_name": None,
        "email": email,
        "individual_name": None,
        "name": name,
        "phone": None,
        "tax_exempt": "none",
        "tax_ids": [],
    }


def recovery(url: str | None, expires_at: int | None) -> dict[str, Any]:
    """Return ``after_expiration`` of a recoverable session; both values are null until it has expired."""
    return {"recovery": {"allow_promotion_codes": False, "enabled": True, "expires_at": expires_at, "url": url}}


def envelope(
    *,
    account: str | None,
    api_version: str,
    created: int,
    data: dict[str, Any],
    event_id: str,
    event_type: str,
    livemode: bool,
    request: dict[str, Any],
) -> dict[str, Any]:
    """Return a snapshot event; ``account`` and ``context`` are there for connected accounts only."""
    head: dict[str, Any] = {"id": event_id, "object": "event"}
    if account is not None:
        head["account"] = account
    head["api_version"] = api_version
    if account is not None:
        head["context"] = account
    head["created"] = created
    head["data"] = data
    head["livemode"] = livemode
    head["pending_webhooks"] = 1
    head["request"] = request
    head["type"] = event_type
    return head
