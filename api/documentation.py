"""The OpenAPI page and ``/docs``, which shows it with assets that we serve."""

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse

from api import problems, webhook

STATIC: Final = "/static-offline-docs"
_SCRIPT: Final = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def install(app: FastAPI) -> None:
    """Serve ``/docs``, and complete the OpenAPI page with what FastAPI does not look for."""
    page = _page(app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return page

    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        schema["paths"].setdefault(webhook.PATH, webhook.OPERATION)
        schema["components"]["schemas"] |= problems.SCHEMAS
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the page


def _page(app: FastAPI) -> HTMLResponse:
    """Return the page, under a policy that lets it load from us alone and run its own script."""
    made = get_swagger_ui_html(
        openapi_url=str(app.openapi_url),
        title=app.title,
        swagger_js_url=f"{STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{STATIC}/swagger-ui.css",
        swagger_favicon_url=f"{STATIC}/favicon.png",
    )
    scripts = _SCRIPT.findall(bytes(made.body).decode())
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    made.headers["Content-Security-Policy"] = "; ".join(
        (
            "default-src 'none'",
            " ".join(("script-src 'self'", *(f"'sha256-{each}'" for each in hashes))),
            "style-src 'self'",
            # The style sheet's icons.
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return made
