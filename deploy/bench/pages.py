"""How long each page and each route that reads takes, and what the web process takes more of memory after them."""

import http.client
from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Final
from urllib.parse import quote, urlencode

from deploy.bench import apart
from deploy.bench.errors import BenchError
from deploy.bench.report import Figure, Run, Target
from deploy.bench.stand import Stand
from deploy.local.ports import LOOPBACK

PAGE: Final = Target(300, at_least=False)
GROWN: Final = Target(15, at_least=False)
WARM_UP: Final = 5
SAMPLES: Final = 40
"""Of each address, with as many ids."""
MB: Final = 1e6

_IDS: Final = {
    "order": "SELECT id FROM orders TABLESAMPLE SYSTEM (1) LIMIT 40",
    "email": "SELECT customer_email FROM orders TABLESAMPLE SYSTEM (1) WHERE customer_email IS NOT NULL LIMIT 40",
    "customer": "SELECT id FROM customers ORDER BY id LIMIT 40",
    "link": "SELECT id FROM payment_links ORDER BY id LIMIT 40",
    "note": "SELECT id FROM credit_notes ORDER BY id LIMIT 40",
    "charge": "SELECT id FROM charges ORDER BY id LIMIT 40",
    "event": "SELECT id FROM inbox ORDER BY seq DESC LIMIT 40",
}
_PAGES: Final = (
    *("/", "/search?q={order}", "/search?q={email}", "/search?q={charge}", "/search?q=20.00+usd"),
    *("/orders", "/orders?status=paid", "/orders/{order}", "/events", "/events?type=invoice.*", "/events?state=parked"),
    *("/events/{event}", "/parked", "/payment-links", "/payment-links/{link}", "/customers", "/customers/{customer}"),
    *("/anomalies", "/reconciliations", "/expiring"),
)
_ROUTES: Final = (
    *("/v1/orders", "/v1/orders?status=paid&limit=100", "/v1/orders?customer_email={email}", "/v1/orders/{order}"),
    *("/v1/orders/{order}/explanation", "/v1/orders/{order}/related", "/v1/payment-links", "/v1/payment-links/{link}"),
    *("/v1/payment-links/{link}/explanation", "/v1/funnel", "/v1/customers", "/v1/customers/{customer}"),
    *("/v1/customers/{customer}/explanation", "/v1/credit-notes", "/v1/credit-notes/{note}", "/v1/invoices"),
    *("/v1/credit-notes/{note}/explanation", "/v1/refunds", "/v1/events", "/v1/events/{event}", "/v1/events/parked"),
    *("/v1/events?type=invoice.*", "/v1/search?q={order}", "/v1/search?q={email}", "/v1/search?q=20.00+usd"),
    *("/v1/summary", "/v1/summary?since=2020-01-01T00:00:00Z", "/v1/anomalies", "/v1/reconciliations", "/v1/status"),
    *("/v1/changes?after=0&wait=0", "/v1/portal/configurations", "/v1/portal/sessions", "/metrics", "/health/ready"),
)


def pages(stand: Stand) -> list[Figure]:
    """Measure the p95 of every page and of every route that reads, each from a warm database, one after the other."""
    stand.run("web")
    stand.analyze()
    count = stand.one("SELECT count(*) FROM inbox")
    ids = {name: stand.column(query) for name, query in _IDS.items()}
    cookie = _cookie(stand)
    warm = [each for path in (*_PAGES, *_ROUTES) for each in _filled(path, ids)[:WARM_UP]]
    stand.seconds_to_read(warm, cookie=cookie)
    before = apart.pss_bytes(stand.pids("web")) if apart.IS_LINUX else None
    asked = {path: each for path in (*_PAGES, *_ROUTES) if (each := _filled(path, ids))}
    taken = {path: quantiles(stand.seconds_to_read(each, cookie=cookie), n=20)[-1] for path, each in asked.items()}
    worst = max(taken, key=lambda path: taken[path])
    found = Figure(
        name="pages",
        title=f"the slowest of {len(_PAGES)} pages and {len(_ROUTES)} routes, p95, {count:,} events",
        unit="ms",
        runs=(Run(taken[worst] * 1000, detail={path: round(each * 1000, 1) for path, each in taken.items()}),),
        target=PAGE,
        note=f"the slowest is {worst}",
    )
    if before is None:
        return [found]
    grown = (apart.pss_bytes(stand.pids("web")) - before) / MB
    return [
        found,
        Figure(
            name="pages_memory",
            title="what the web process grows by while they are read",
            unit="MB",
            runs=(Run(grown),),
            target=GROWN,
        ),
    ]


def _filled(path: str, ids: Mapping[str, Sequence[str]]) -> list[str]:
    """Return *path* as often as it is read, with another id each time; nothing where there is no such object."""
    name = next((name for name in ids if f"{{{name}}}" in path), None)
    if name is None:
        return [path] * SAMPLES
    found = [path.replace(f"{{{name}}}", quote(id_, safe="")) for id_ in ids[name]]
    return (found * SAMPLES)[:SAMPLES]


def _cookie(stand: Stand) -> str:
    connection = http.client.HTTPConnection(LOOPBACK, stand.port, timeout=30)
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Origin": f"http://{LOOPBACK}:{stand.port}"}
    connection.request("POST", "/login", urlencode({"token": stand.token}), headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    given = answer.headers.get("set-cookie")
    if given is None:
        raise BenchError(f"the login was answered with {answer.status}.")
    return given.partition(";")[0]
