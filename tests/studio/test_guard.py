"""Who may talk to the studio."""

from __future__ import annotations

import asyncio
from base64 import b64encode

import pytest

from personalize.studio.guard import COOKIE, LOOPBACK, Guard


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


def asked(guard, *, query="", **headers):
    """Status and headers of the answer to a request."""
    sent = []

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http", "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    asyncio.run(guard(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def guard(**settings):
    return Guard(application, **{"hosts": set(LOOPBACK), "largest_upload": 500_000_000} | settings)


def test_the_page_is_answered_and_may_load_nothing_from_elsewhere():
    status, headers = asked(guard())
    assert status == 200
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "http" not in policy


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[bad"])
def test_another_name_for_this_machine_is_refused(host):
    assert asked(guard(), host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_the_machines_own_names_are_answered(host):
    assert asked(guard(), host=host)[0] == 200


def test_a_page_of_another_site_may_not_use_it():
    assert asked(guard(), origin="https://evil.example")[0] == 403
    assert asked(guard(), origin="http://127.0.0.1:9999")[0] == asked(guard(), origin="http://[bad")[0] == 403
    assert asked(guard(), origin="http://127.0.0.1:7860")[0] == 200


def test_the_password_is_asked_for():
    locked = guard(hosts=None, password="me:secret")
    status, headers = asked(locked)
    assert status == 401 and b"www-authenticate" in headers
    for wrong in ("Basic " + b64encode(b"me:wrong").decode(), "Basic ???", "Bearer x"):
        assert asked(locked, authorization=wrong)[0] == 401
    assert asked(locked, authorization="Basic " + b64encode(b"me:secret").decode())[0] == 200


def test_the_token_opens_the_page_once_and_a_cookie_afterwards():
    locked = guard(hosts=None, token="abc123")
    assert asked(locked)[0] == 401
    assert asked(locked, query="token=wrong")[0] == 401
    status, headers = asked(locked, query="token=abc123")
    cookie = headers[b"set-cookie"].decode()
    assert status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert asked(locked, cookie=f"{COOKIE}=abc123")[0] == 200
    assert asked(locked, cookie=f"{COOKIE}=wrong")[0] == 401


def test_an_upload_of_more_than_500_mb_gets_one_line():
    assert asked(guard(), content_length="500000001")[0] == 413
    assert asked(guard(), content_length="499999999")[0] == 200


@pytest.mark.parametrize("length", [9, 10, 11, 25])
def test_an_upload_in_chunks_without_its_length_is_counted(length):
    """Ten bytes pass; the eleventh ends the request, which the application may not answer any more."""

    async def counting(scope, receive, send):
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                await send({"type": "http.response.start", "status": 500, "headers": []})
                raise ConnectionError("the client has gone")
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    parts, sent = [b"x" * min(4, length - at) for at in range(0, length, 4)], []

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "query_string": b"", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(Guard(counting, hosts=set(LOOPBACK), largest_upload=10)(scope, receive, send))
    assert [one.get("status", one.get("body")) for one in sent] == (
        [200, str(length).encode()]
        if length <= 10
        else [413, b"a file may have 0 MB, this one has more: make it smaller first"]
    )
