"""Who may talk to the studio: the same machine, or who knows the password; and nothing is loaded from elsewhere.

It stands before everything else that answers a request.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Awaitable, Callable, Sequence
from http.cookies import CookieError, SimpleCookie
from secrets import compare_digest
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
COOKIE = "personalize_studio"
# the browser itself refuses what would be loaded from another host
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
Scope = dict[str, Any]
Channel = Callable[..., Awaitable[Any]]


class Guard:
    """An ASGI application that passes on what may pass.

    Args:
        application: what answers.
        hosts: names by which the studio may be called, against pages of other sites whose name was made to point here;
            None for any.
        password: "user:password" of HTTP's basic authentication, if there is one.
        token: must be in the address once, as `?token=…`; then a cookie holds it.
        largest_upload: bytes of a request.
    """

    def __init__(
        self, application: Any, *, hosts: set[str] | None, password: str | None = None, token: str | None = None,
        largest_upload: int,
    ) -> None:  # fmt: skip
        self.application, self.hosts, self.largest_upload = application, hosts, largest_upload
        self.password, self.token = password, token

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.application(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            return await answer(send, *refusal)
        received, refused = 0, False

        async def receive_counted() -> Any:  # a request may come in chunks, without its length
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.largest_upload and not refused:
                await answer(send, 413, self._too_large())
                refused = True
            return {"type": "http.disconnect"} if refused else message

        async def send_with_policy(message: dict[str, Any]) -> None:
            if refused:
                return
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                if self.token is not None and self._token_in_address(scope):
                    added.append((b"set-cookie", f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/".encode()))
                message = message | {"headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            await self.application(scope, receive_counted, send_with_policy)
        except Exception:
            if not refused:  # else it is the application's, to whom the request was cut off
                raise

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """The answer to a request that may not pass: status, text, headers; None for one that may."""
        host = headers.get("host", "")
        if self.hosts is not None and _parts(f"//{host}").hostname not in self.hosts:
            return 403, f"the studio does not answer to the name {host}", []
        origin = headers.get("origin")
        if origin is not None and _parts(origin).netloc != host:
            return 403, f"a page of {origin} may not use the studio", []
        if self.password is not None and not _basic(headers.get("authorization", ""), self.password):
            return 401, "user and password, please", [(b"www-authenticate", b'Basic realm="personalize studio"')]
        if self.token is not None and not (self._token_in_address(scope) or self._token_in_cookie(headers)):
            return 401, "open the address that the terminal shows: it holds the token", []
        if int(headers.get("content-length") or 0) > self.largest_upload:
            return 413, self._too_large(), []
        return None

    def _too_large(self) -> str:
        return f"a file may have {self.largest_upload // 10**6} MB, this one has more: make it smaller first"

    def _token_in_address(self, scope: Scope) -> bool:
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        return self.token is not None and compare_digest(given.encode(), self.token.encode())

    def _token_in_cookie(self, headers: dict[str, str]) -> bool:
        try:
            given = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return (
            given is not None and self.token is not None and compare_digest(given.value.encode(), self.token.encode())
        )


def _parts(address: str) -> SplitResult:
    """The parts of an address; empty ones if it is none."""
    try:
        return urlsplit(address)
    except ValueError:  # a bracket that is not closed
        return urlsplit("")


def _basic(header: str, password: str) -> bool:
    """Is this header the one of basic authentication with `password`, "user:password"?"""
    kind, _, code = header.partition(" ")
    try:
        return kind.lower() == "basic" and compare_digest(b64decode(code), password.encode())
    except ValueError:
        return False


async def answer(send: Channel, status: int, text: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Send a short text as the whole answer."""
    plain = [(b"content-type", b"text/plain; charset=utf-8"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": plain})
    await send({"type": "http.response.body", "body": text.encode()})
