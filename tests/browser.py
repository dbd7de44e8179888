"""A real headless Chromium, driven over its own protocol: open a page, wait for what it shows, take a picture."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import websockets

CHROMIUM = shutil.which("chromium")
DEADLINE_S = 600.0
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,800", "--remote-debugging-port=0", "about:blank")


class Browser:
    """One tab of a browser."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._ids = socket, itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events are passed over."""
        await self._socket.send(json.dumps({"id": (own := next(self._ids)), "method": method, "params": parameters}))
        while (answer := json.loads(await self._socket.recv())).get("id") != own:
            pass
        return answer.get("result", {})

    async def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page; None while there is none."""
        return (await self.call("Runtime.evaluate", expression=expression, awaitPromise=True)).get("result", {}).get("value")

    async def open(self, address: str, expression: str) -> Any:
        """Open a page and return the value of an expression once it is true. Raises TimeoutError with what the page shows."""
        await self.call("Page.navigate", url=address)
        return await self.until(expression)

    async def until(self, expression: str) -> Any:
        """Return the value of an expression once it is true. Raises TimeoutError with what the page shows."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (found := await self.value(expression)):
                    await asyncio.sleep(0.2)
                return found
        except TimeoutError:
            raise TimeoutError(f"{await self.value('location.href')}: {await self.value('document.body.innerText')}") from None

    async def picture(self, path: Path) -> None:
        """Write what the page shows as PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def browser(profile: Path) -> AsyncGenerator[Browser]:
    """Yield a tab of a browser with a profile of its own."""
    assert CHROMIUM
    process = subprocess.Popen([CHROMIUM, f"--user-data-dir={profile}", *_FLAGS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not (port := profile / "DevToolsActivePort").is_file() or "\n" not in port.read_text():
                await asyncio.sleep(0.1)
        address = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json"
        tab = next(tab for tab in httpx.get(address, trust_env=False, timeout=DEADLINE_S).json() if tab["type"] == "page")
        async with websockets.connect(tab["webSocketDebuggerUrl"], max_size=1 << 26, open_timeout=DEADLINE_S, ping_interval=None) as socket:
            yield Browser(socket)
    finally:
        process.kill()
        process.wait()
