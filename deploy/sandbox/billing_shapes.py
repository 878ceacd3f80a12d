"""The shapes of Stripe's objects of money, in the way of ``shapes``: every field of API version 2026-10-28.endive.

Customers, invoices, credit notes, payments, refunds, disputes and the billing portal.
"""

from typing import Any, Final

LIST_PAGE_MAX: Final = 10
"""How many items of a list an event holds: the first page."""

_CUSTOMER: Final[dict[str, Any]] = {
    "id": None,
    "object": "customer",
    "address": None,
    "balance": 0,
    "business_name": None,
    "created": None,
    "currency": None,
    "customer_account": None,
    "default_source": None,
    "delinquent": False,
    "description": None,
    "discount": None,
    "email": None,
    "individual_name": None,
    "invoice_prefix": None,
    "invoice_settings": {
        "custom_fields": None,
        "default_payment_method": None,
        "footer": None,
        "rendering_options": None,
    },
    "livemode": None,
    "metadata": {},
    "name": None,
    "phone": None,
    "preferred_locales": [],
    "shipping": None,
    "tax_exempt": "none",
    "test_clock": None,
}

_CUSTOMER_BALANCE_TRANSACTION: Final[dict[str, Any]] = {
    "id": None,
    "object": "customer_balance_transaction",
    "amount": None,
    "checkout_session": None,
    "created": None,
    "credit_note": None,
    "currency": None,
    "customer": None,
    "customer_account": None,
    "description": None,
    "ending_balance": None,
    "invoice": None,
    "livemode": None,
    "metadata": {},
    "type": None,
}

_INVOICE: Final[dict[str, Any]] = {
    "id": None,
    "object": "invoice",
    "account_country": "US",
    "account_name": "Sandbox shop",
    "account_tax_ids": None,
    "amount_due": None,
    "amount_overpaid": 0,
    "amount_paid": 0,
    "amount_paid_off_stripe": 0,
    "amount_remaining": None,
    "amount_shipping": 0,
    "application": None,
    "attempt_count": 0,
    "attempted": False,
    "auto_advance": False,
    "automatic_tax": {
        "disabled_reason": None,
        "enabled": False,
        "liability": None,
        "provider": None,
        "status": None,
    },
    "automatically_finalizes_at": None,
    "billing_reason": "manual",
    "collection_method": "charge_automatically",
    "created": None,
    "currency": None,
    "custom_fields": None,
    "customer": None,
    "customer_account": None,
    "customer_address": None,
    "customer_email": None,
    "customer_name": None,
    "customer_phone": None,
    "customer_shipping": None,
    "customer_tax_exempt": "none",
    "customer_tax_ids": [],
    "default_payment_method": None,
    "default_source": None,
    "default_tax_rates": [],
    "description": None,
    "discounts": [],
    "due_date": None,
    "effective_at": None,
    "ending_balance": None,
    "footer": None,
    "from_invoice": None,
    "hosted_invoice_url": None,
    "invoice_pdf": None,
    "issuer": {"type": "self"},
    "last_finalization_error": None,
    "latest_revision": None,
    "lines": None,
    "livemode": None,
    "metadata": {},
    "next_payment_attempt": None,
    "number": None,
    "on_behalf_of": None,
    "parent": None,
    "payment_settings": {"default_mandate": None, "payment_method_options": None, "payment_method_types": None},
    "period_end": None,
    "period_start": None,
    "post_payment_credit_notes_amount": 0,
    "pre_payment_credit_notes_amount": 0,
    "receipt_number": None,
    "rendering": None,
    "shipping_cost": None,
    "shipping_details": None,
    "starting_balance": None,
    "statement_descriptor": None,
    "status": "draft",
    "status_details": None,
    "status_transitions": {
        "finalized_at": None,
        "marked_uncollectible_at": None,
        "paid_at": None,
        "voided_at": None,
    },
    "subtotal": None,
    "subtotal_excluding_tax": None,
    "test_clock": None,
    "total": None,
    "total_discount_amounts": [],
    "total_excluding_tax": None,
    "total_pretax_credit_amounts": [],
    "total_taxes": [],
    "webhooks_delivered_at": None,
}

_CREDIT_NOTE: Final[dict[str, Any]] = {
    "id": None,
    "object": "credit_note",
    "amount": None,
    "amount_shipping": 0,
    "created": None,
    "currency": None,
    "customer": None,
    "customer_account": None,
    "customer_balance_transaction": None,
    "discount_amount": 0,
    "discount_amounts": [],
    "effective_at": None,
    "invoice": None,
    "lines": None,
    "livemode": None,
    "memo": None,
    "metadata": {},
    "number": None,
    "out_of_band_amount": None,
    "pdf": None,
    "post_payment_amount": None,
    "pre_payment_amount": None,
    "pretax_credit_amounts": [],
    "reason": None,
    "refunds": [],
    "shipping_cost": None,
    "status": "issued",
    "subtotal": None,
    "subtotal_excluding_tax": None,
    "total": None,
    "total_excluding_tax": None,
    "total_taxes": [],
    "type": None,
    "voided_at": None,
}

_PAYMENT_INTENT: Final[dict[str, Any]] = {
    "id": None,
    "object": "payment_intent",
    "allowed_payment_method_types": None,
    "amount": None,
    "amount_capturable": 0,
    "amount_details": {"tip": {}},
    "amount_received": 0,
    "application": None,
    "application_fee_amount": None,
    "automatic_payment_methods": None,
    "canceled_at": None,
    "cancellation_reason": None,
    "capture_method": "automatic",
    "client_secret": None,
    "confirmation_method": "automatic",
    "created": None,
    "currency": None,
    "customer": None,
    "customer_account": None,
    "description": None,
    "excluded_payment_method_types": None,
    "last_payment_error": None,
    "latest_charge": None,
    "livemode": None,
    "managed_payments": {"enabled": False},
    "metadata": {},
    "next_action": None,
    "on_behalf_of": None,
    "payment_method": None,
    "payment_method_options": {},
    "payment_method_types": ["card"],
    "processing": None,
    "receipt_email": None,
    "review": None,
    "setup_future_usage": None,
    "shipping": None,
    "source": None,
    "statement_descriptor": None,
    "statement_descriptor_suffix": None,
    "status": "requires_payment_method",
    "transfer_data": None,
    "transfer_group": None,
}

_CHARGE: Final[dict[str, Any]] = {
    "id": None,
    "object": "charge",
    "amount": None,
    "amount_captured": 0,
    "amount_refunded": 0,
    "application": None,
    "application_fee": None,
    "application_fee_amount": None,
    "balance_transaction": None,
    "billing_details": {"address": None, "email": None, "name": None, "phone": None, "tax_id": None},
    "calculated_statement_descriptor": "SANDBOX SHOP",
    "captured": False,
    "created": None,
    "currency": None,
    "customer": None,
    "description": None,
    "disputed": False,
    "failure_balance_transaction": None,
    "failure_code": None,
    "failure_message": None,
    "fraud_details": {},
    "livemode": None,
    "metadata": {},
    "on_behalf_of": None,
    "outcome": {
        "advice_code": None,
        "network_advice_code": None,
        "network_decline_code": None,
        "network_status": "approved_by_network",
        "reason": None,
        "risk_level": "normal",
        "risk_score": 12,
        "seller_message": "Payment complete.",
        "type": "authorized",
    },
    "paid": False,
    "payment_intent": None,
    "payment_method": None,
    "payment_method_details": None,
    "receipt_email": None,
    "receipt_number": None,
    "receipt_url": None,
    "refunded": False,
    "review": None,
    "shipping": None,
    "source": None,
    "source_transfer": None,
    "statement_descriptor": None,
    "statement_descriptor_suffix": None,
    "status": "pending",
    "transfer_data": None,
    "transfer_group": None,
}

_REFUND: Final[dict[str, Any]] = {
    "id": None,
    "object": "refund",
    "amount": None,
    "balance_transaction": None,
    "charge": None,
    "created": None,
    "currency": None,
    "customer": None,
    "customer_account": None,
    "destination_details": None,
    "metadata": {},
    "payment_intent": None,
    "payment_method": None,
    "reason": None,
    "receipt_number": None,
    "source_transfer_reversal": None,
    "status": None,
    "transfer_reversal": None,
}

_EVIDENCE: Final = dict.fromkeys(
    (
        "access_activity_log",
        "billing_address",
        "cancellation_policy",
        "cancellation_policy_disclosure",
        "cancellation_rebuttal",
        "customer_communication",
        "customer_email_address",
        "customer_name",
        "customer_purchase_ip",
        "customer_signature",
        "duplicate_charge_documentation",
        "duplicate_charge_explanation",
        "duplicate_charge_id",
        "product_description",
        "receipt",
        "refund_policy",
        "refund_policy_disclosure",
        "refund_refusal_explanation",
        "service_date",
        "service_documentation",
        "shipping_address",
        "shipping_carrier",
        "shipping_date",
        "shipping_documentation",
        "shipping_tracking_number",
        "uncategorized_file",
        "uncategorized_text",
    )
)

_DISPUTE: Final[dict[str, Any]] = {
    "id": None,
    "object": "dispute",
    "amount": None,
    "balance_transactions": [],
    "charge": None,
    "created": None,
    "currency": None,
    "enhanced_eligibility_types": [],
    "evidence": {**_EVIDENCE, "enhanced_evidence": {}},
    "evidence_details": None,
    "is_charge_refundable": None,
    "livemode": None,
    "metadata": {},
    "payment_intent": None,
    "payment_method_details": {
        "card": {
            "brand": "visa",
            "case_type": "chargeback",
            "network": "visa",
            "network_reason_code": "13.1",
        },
        "type": "card",
    },
    "reason": None,
    "status": None,
}

_PORTAL_CONFIGURATION: Final[dict[str, Any]] = {
    "id": None,
    "object": "billing_portal.configuration",
    "active": True,
    "application": None,
    "business_profile": {"headline": None, "privacy_policy_url": None, "terms_of_service_url": None},
    "created": None,
    "default_return_url": None,
    "features": {
        "customer_update": {"allowed_updates": ["email", "tax_id"], "enabled": True},
        "invoice_history": {"enabled": True},
        "payment_method_update": {"enabled": True, "payment_method_configuration": None},
        "subscription_cancel": {
            "cancellation_reason": {"enabled": False, "options": ["too_expensive", "unused", "other"]},
            "enabled": True,
            "mode": "at_period_end",
            "proration_behavior": "none",
        },
        "subscription_pause": {"duration": {"interval_options": [], "type": "indefinite"}, "enabled": False},
        "subscription_update": {
            "billing_cycle_anchor": "unchanged",
            "default_allowed_updates": [],
            "enabled": False,
            "products": None,
            "proration_behavior": "none",
            "schedule_at_period_end": {"conditions": []},
            "trial_update_behavior": "end_trial",
        },
    },
    "is_default": None,
    "livemode": None,
    "login_page": {"enabled": False, "url": None},
    "metadata": {},
    "name": None,
    "updated": None,
}

_PORTAL_SESSION: Final[dict[str, Any]] = {
    "id": None,
    "object": "billing_portal.session",
    "after_expiration": None,
    "configuration": None,
    "created": None,
    "customer": None,
    "customer_account": None,
    "flow": None,
    "livemode": None,
    "locale": None,
    "on_behalf_of": None,
    "return_url": None,
    "url": None,
}


def customer(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a customer with *fields* laid over the defaults: no balance and no currency yet."""
    return {**_CUSTOMER, **fields}


def customer_balance_transaction(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a customer's credit ledger."""
    return {**_CUSTOMER_BALANCE_TRANSACTION, **fields}


def invoice(fields: dict[str, Any]) -> dict[str, Any]:
    """Return an invoice with *fields* laid over the defaults: a draft that nothing was paid of."""
    return {**_INVOICE, **fields}


def invoice_line(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a line of an invoice."""
    return {
        "id": None,
        "object": "line_item",
        "amount": None,
        "currency": None,
        "description": "Sandbox thing",
        "discount_amounts": [],
        "discountable": True,
        "discounts": [],
        "invoice": None,
        "livemode": None,
        "metadata": {},
        "parent": None,
        "period": None,
        "pretax_credit_amounts": [],
        "pricing": None,
        "quantity": 1,
        "quantity_decimal": "1",
        "subscription": None,
        "subtotal": None,
        "taxes": [],
        **fields,
    }


def invoice_payment(fields: dict[str, Any]) -> dict[str, Any]:
    """Return an invoice payment: the part of an invoice that a payment intent paid."""
    return {
        "id": None,
        "object": "invoice_payment",
        "amount_paid": None,
        "amount_requested": None,
        "created": None,
        "currency": None,
        "invoice": None,
        "is_default": True,
        "livemode": None,
        "payment": None,
        "status": "open",
        "status_transitions": {"canceled_at": None, "paid_at": None},
        **fields,
    }


def credit_note(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a credit note with *fields* laid over the defaults: issued, and going nowhere yet."""
    return {**_CREDIT_NOTE, **fields}


def credit_note_line(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a line of a credit note; ``invoice_line_item`` is there only where it names one."""
    return {
        "id": None,
        "object": "credit_note_line_item",
        "amount": None,
        "description": "Sandbox thing",
        "discount_amount": 0,
        "discount_amounts": [],
        "livemode": None,
        "metadata": {},
        "pretax_credit_amounts": [],
        "quantity": 1,
        "tax_rates": [],
        "taxes": [],
        "type": "custom_line_item",
        "unit_amount": None,
        "unit_amount_decimal": None,
        **fields,
    }


def tax(amount: int, taxable: int, rate: str) -> dict[str, Any]:
    """Return one of ``total_taxes``: a tax on top of the price."""
    return {
        "amount": amount,
        "tax_behavior": "exclusive",
        "tax_rate_details": {"tax_rate": rate},
        "taxability_reason": "not_available",
        "taxable_amount": taxable,
        "type": "tax_rate_details",
    }


def first_page(items: list[dict[str, Any]], url: str) -> dict[str, Any]:
    """Return a list as events hold it: its first ten items."""
    return {
        "object": "list",
        "data": items[:LIST_PAGE_MAX],
        "has_more": len(items) > LIST_PAGE_MAX,
        "url": url,
    }


def payment_intent(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a payment intent with *fields* laid over the defaults: it wants a payment method."""
    return {**_PAYMENT_INTENT, **fields}


def charge(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a charge with *fields* laid over the defaults: pending."""
    return {**_CHARGE, **fields}


def payment_method_details(method: str) -> dict[str, Any]:
    """Return a charge's ``payment_method_details``: of a card, or only the name of another method."""
    if method != "card":
        return {method: {}, "type": method}
    details = {"brand": "visa", "country": "US", "exp_month": 8, "exp_year": 2030, "funding": "credit", "last4": "4242"}
    return {"card": details, "type": "card"}


def refund(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a refund; it has no ``livemode``, and a reason for failing or waiting only where it does."""
    return {**_REFUND, **fields}


def dispute(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a dispute without evidence."""
    return {**_DISPUTE, **fields}


def evidence_details(due_by: int, submissions: int) -> dict[str, Any]:
    """Return a dispute's ``evidence_details`` after so many submissions."""
    return {
        "due_by": due_by,
        "enhanced_eligibility": {},
        "has_evidence": submissions > 0,
        "past_due": False,
        "submission_count": submissions,
        "submission_method": "manual" if submissions else "not_submitted",
    }


def balance_transaction(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a movement on the shop's own Stripe balance, as a dispute lists those it caused."""
    return {
        "id": None,
        "object": "balance_transaction",
        "amount": None,
        "available_on": None,
        "balance_type": "payments",
        "created": None,
        "currency": None,
        "description": None,
        "exchange_rate": None,
        "fee": 0,
        "fee_details": [],
        "net": None,
        "reporting_category": "dispute",
        "source": None,
        "status": "pending",
        "type": "adjustment",
        **fields,
    }


def portal_configuration(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a portal configuration with *fields* laid over the defaults: active."""
    return {**_PORTAL_CONFIGURATION, **fields}


def portal_session(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a portal session."""
    return {**_PORTAL_SESSION, **fields}


def portal_flow(kind: str) -> dict[str, Any]:
    """Return a portal session's ``flow``: the one thing that the customer is sent there for."""
    return {
        "after_completion": {"hosted_confirmation": None, "redirect": None, "type": "portal_homepage"},
        "customer_update": None,
        "subscription_cancel": None,
        "subscription_pause": None,
        "subscription_update": None,
        "subscription_update_confirm": None,
        "type": kind,
    }
