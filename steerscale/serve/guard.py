"""Who may call: on a loopback address only pages and programs that call it by a loopback name."""

from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from steerscale.serve.errors import RequestError


class Guard:
    """Refuses requests for other hosts before anything else looks at them."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None) -> None:
        """`hosts`: names that are answered to; None: all."""
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] == "http" and self._hosts is not None:
            # A page of another site may point its own name at 127.0.0.1; its name gives it away.
            host = _host(Request(scope).headers.get("host", ""))
            if host not in self._hosts:
                error = RequestError(f"call this server by one of {', '.join(sorted(self._hosts))}", status=403)
                await JSONResponse(error.body, status_code=403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _host(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
