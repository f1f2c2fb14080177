"""A headless Chromium that a test types into and looks at, over the DevTools protocol (aiohttp speaks it)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.helpers.html_page import browser

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0"),
)
PATIENCE_S = 120  # machines that run tests are slow


class Tab:
    """One page. `problems` are what its console, its policy and its requests complained of."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []
        self.requested: list[str] = []  # URLs
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._answers.pop(data["id"]).set_result(data)
            elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] == "error":
                self.problems.append(data["params"]["entry"]["text"])
            elif data["method"] == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(data["params"]["exceptionDetails"])[:500])
            elif data["method"] == "Network.requestWillBeSent":
                self.requested.append(data["params"]["request"]["url"])

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol; its result."""
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        answer = await asyncio.wait_for(self._answers[number], PATIENCE_S)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is."""
        found = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until it is true."""
        async with asyncio.timeout(PATIENCE_S):
            while not await self.value(f"Boolean({expression})"):
                await asyncio.sleep(0.05)

    async def open(self, url: str) -> None:
        found = await self.send("Page.navigate", url=url)
        assert "errorText" not in found, found
        await self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    async def look(self, *, width: int, height: int = 900, dark: bool = False, still: bool = True) -> None:
        """The size of the window and what its user prefers."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def key(self, key: str, *, control: bool = False) -> None:
        """Press and release a key."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 if control else 0}
        text = {"text": "\r"} if key == "Enter" and not control else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **text, **common)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    async def point(self, element: str) -> None:
        """Move the mouse to the middle of the first line of an element, given as a JavaScript expression."""
        await self.value(f"({element}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        await self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")  # its event is over
        x, y = await self.value(f"(r => [r.left + r.width / 2, r.top + r.height / 2])(({element}).getClientRects()[0])")
        await self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """A PNG of the whole page, or of what the window shows."""
        found = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def open_tab(folder: Path) -> AsyncIterator[Tab]:
    """A Chromium of its own, its profile in `folder`; ended afterwards."""
    import aiohttp

    command = [str(browser()), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "profile" / "DevToolsActivePort"
        async with asyncio.timeout(PATIENCE_S):
            while not port_file.is_file() or not port_file.read_text().strip():
                assert process.poll() is None, "Chromium did not start"
                await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (page,) = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.send(f"{domain}.enable")
                yield tab
                tab._reading.cancel()
    finally:
        process.terminate()
        process.wait(30)
