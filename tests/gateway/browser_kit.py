"""A real Chromium, driven over the DevTools protocol: one browser with one page, and nothing left of it after."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

from supervisor.client import ConnectionClosed, WebSocket, open_websocket_url

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_S = 40.0
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--disable-crash-reporter",
    "--disable-breakpad",
    "--mute-audio",
    "--hide-scrollbars",
    "--window-size=1280,800",
    # Whatever asks for another host than this one gets no answer.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)
_KEYS = {"Enter": 13, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9}


class Page:
    """One tab. Every wait is bounded; what the page complains of is kept in `complaints`."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._session: str | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._waiting: dict[int, trio.Event] = {}
        self._count = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []

    async def pump(self, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._take(json.loads(await self._websocket.receive()))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            self._waiting[message["id"]].set()
            return
        told = message.get("params", {})
        match message["method"]:
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["exceptionDetails"]))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(told["url"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        number = self._count
        answered = self._waiting[number] = trio.Event()
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        with trio.fail_after(PATIENCE_S):
            await self._websocket.send(json.dumps(message))
            await answered.wait()
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def attach(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def wait_for(self, condition: str) -> Any:
        """Until the expression is true; it is looked at twenty times a second."""
        value = None
        with trio.move_on_after(PATIENCE_S):
            while not (value := await self.evaluate(condition)):
                await trio.sleep(0.05)
            return value
        shown = await self.evaluate("document.body.innerText")
        raise AssertionError(f"did not come true: {condition}\n{shown}\n{self.complaints}")

    async def text(self, selector: str) -> str:
        return await self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    async def wait_for_text(self, selector: str, text: str) -> None:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        await self.wait_for(f"{found}.some((one) => one.textContent.includes({json.dumps(text)}))")

    async def click(self, selector: str) -> None:
        """As a person does: once it is there to be clicked, and neither hidden nor covered, at its middle."""
        box = await self.wait_for(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{block: "nearest"}});
                const {{x, y, width, height}} = element.getBoundingClientRect();
                const at = document.elementFromPoint(x + width / 2, y + height / 2);
                const hit = at !== null && (element.contains(at) || at.contains(element));
                return hit && width > 0 && !element.disabled && {{x: x + width / 2, y: y + height / 2}};
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=box["x"], y=box["y"], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, ctrl: bool = False) -> None:
        code = _KEYS.get(key) or ord(key.upper())
        text = {"text": "\r"} if key == "Enter" else {}
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 2 if ctrl else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    async def look(self, *, width: int, height: int, dark: bool = False, mobile: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        answer = await self.call("Page.captureScreenshot", format="png")
        await trio.Path(path).write_bytes(base64.b64decode(answer["data"]))


@contextlib.asynccontextmanager
async def open_browser(profile: Path):
    """A browser with a new, empty profile. On leaving, every process of it has ended."""
    assert CHROMIUM is not None
    process = await trio.lowlevel.open_process(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "HOME": str(profile), "XDG_CONFIG_HOME": str(profile), "XDG_CACHE_HOME": str(profile)},
    )
    try:
        url = await _debugger(profile, process)
        async with open_websocket_url(url, max_message_bytes=64 << 20) as websocket, trio.open_nursery() as nursery:
            page = Page(websocket)
            await nursery.start(page.pump)
            await page.attach()
            yield page
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(10, shield=True):
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with trio.move_on_after(3):
                    await process.wait()
                    break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            while _processes_of(profile):
                for pid in _processes_of(profile):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await trio.sleep(0.02)


async def _debugger(profile: Path, process: trio.Process) -> str:
    told = profile / "DevToolsActivePort"
    with trio.fail_after(PATIENCE_S):
        while True:
            assert process.poll() is None, f"Chromium ended with {process.returncode}"
            lines = told.read_text().split("\n") if told.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            await trio.sleep(0.05)


def _processes_of(profile: Path) -> list[int]:
    """Chromium's helpers leave its session, so they are found by the profile that each one names."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and any(str(profile).encode() in argument for argument in arguments):
                found.append(int(entry.name))
    return found


def hosts_of(urls: list[str]) -> set[str]:
    return {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in ("data", "about", "blob")}
