"""An HTTP client for servers that are not trusted: they cannot hold it up, flood it or redirect it.

A request follows no redirect, which could lead to a machine that only this one reaches, and takes
the prompts along. It ends after a number of seconds, however slowly bytes trickle in, and its reply
has a limit, which compression cannot get around: none is asked for, and none is undone.

Of a reply, status and body are passed on, and the headers about retries and redirects.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai

__all__ = ["MAX_REPLY", "BoundedClient", "UnreadableReply"]

MAX_REPLY = 2**20
"""Bytes of a reply: 300,000 tokens at least."""
_PASSED_ON = ("location", "retry-after", "retry-after-ms", "x-should-retry")


class UnreadableReply(openai.OpenAIError):  # the reply is at fault
    """A reply that is too long, or compressed; `openai` does not ask for it again."""


class BoundedClient(httpx.AsyncClient):
    """A client to pass to `openai`.

    Args:
        seconds: How long a request may take in total, from connecting to the last byte.
    """

    def __init__(self, seconds: float) -> None:
        # Connecting ends earlier, so that a missing server is not mistaken for a slow one.
        super().__init__(
            timeout=httpx.Timeout(seconds, connect=seconds / 2),
            limits=httpx.Limits(),
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
        )
        self._seconds = seconds

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Sends a request.

        Raises:
            UnreadableReply: A successful reply has a body that is too long, or compressed.
            httpx.HTTPError: As `httpx` does; a timeout also if the whole took too long.
        """
        try:
            async with asyncio.timeout(self._seconds):
                reply = await super().send(request, **{**options, "stream": True})
                try:
                    body = await _body(reply)
                finally:
                    await reply.aclose()
        except TimeoutError:
            raise httpx.ReadTimeout("The reply took too long.", request=request) from None
        if body is None and reply.is_success:
            raise UnreadableReply
        # Without the server's Content-Type, whose charset could be any of Python's codecs.
        headers = {name: reply.headers[name] for name in _PASSED_ON if name in reply.headers}
        return httpx.Response(
            reply.status_code,
            headers={**headers, "content-type": "application/json"},
            content=body or b"",
            request=request,
        )


async def _body(reply: httpx.Response) -> bytes | None:
    """Reads a body; None if it is too long or compressed."""
    if reply.headers.get("content-encoding", "identity").lower() != "identity":
        return None
    body = bytearray()
    async for block in reply.aiter_raw():
        body += block
        if len(body) > MAX_REPLY:
            return None
    return bytes(body)
