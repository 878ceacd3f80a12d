"""The plain alternative, as tutorials show it: a FastAPI route, one Celery task per event, one upsert per task.

It verifies with Stripe's own library, keeps no event, and ignores order and duplicates. `payfold bench` measures its
cost with the same event loop and HTTP parser, on the same servers::

    python -m uvicorn tests.benchmarks.plain:app
    python -m celery -A tests.benchmarks.plain:celery worker --concurrency 2
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import stripe
from celery import Celery
from celery.signals import worker_init
from fastapi import FastAPI, HTTPException, Request
from sqlalchemy import BigInteger, DateTime, MetaData, String, create_engine
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

SCHEMA = "plain"

engine = create_engine(os.environ["PLAIN_DATABASE_URL"])
celery = Celery("plain", broker=os.environ["PLAIN_BROKER_URL"])
celery.conf.task_ignore_result = True


class Base(DeclarativeBase):
    """The tables, in a schema of their own."""

    metadata = MetaData(schema=SCHEMA)


class Order(Base):
    """An order, with the values of the last delivery."""

    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    status: Mapped[str | None]
    payment_status: Mapped[str | None]
    currency: Mapped[str | None]
    amount_total: Mapped[int | None] = mapped_column(BigInteger)
    customer: Mapped[str | None] = mapped_column(index=True)
    customer_email: Mapped[str | None]
    payment_link: Mapped[str | None] = mapped_column(index=True)
    payment_intent: Mapped[str | None] = mapped_column(index=True)
    details: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


@worker_init.connect
def make_tables(**_: object) -> None:
    """Make the tables, unless the other process was quicker."""
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1)")
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        Base.metadata.create_all(connection)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the tables."""
    make_tables()
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/webhooks/stripe")
async def webhook(request: Request) -> dict[str, bool]:
    """Verify a delivery and queue it for the worker."""
    body = await request.body()
    header = request.headers.get("stripe-signature", "")
    try:
        stripe.Webhook.construct_event(body, header, os.environ["STRIPE_WEBHOOK_SECRETS"])
    except (ValueError, stripe.SignatureVerificationError):
        raise HTTPException(400) from None
    handle.delay(body.decode())
    return {"received": True}


@celery.task(name="plain.handle")
def handle(payload: str) -> None:
    """Write an order with the values of the event; ignore events of other objects."""
    event = json.loads(payload)
    if not event["type"].startswith("checkout.session."):
        return
    session = event["data"]["object"]
    values = {
        "id": session["id"],
        "status": session["status"],
        "payment_status": session["payment_status"],
        "currency": session["currency"],
        "amount_total": session["amount_total"],
        "customer": session["customer"],
        "customer_email": (session["customer_details"] or {}).get("email"),
        "payment_link": session["payment_link"],
        "payment_intent": session["payment_intent"],
        "details": session["metadata"],
        "updated_at": datetime.now(UTC),
    }
    statement = insert(Order).values(values)
    with Session(engine) as database:
        database.execute(statement.on_conflict_do_update(index_elements=[Order.id], set_=values))
        database.commit()
