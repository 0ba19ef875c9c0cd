"""The page `/` and `/docs` in a real browser, against a supervisor as `tenantry serve` starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from urllib.parse import unquote

import attrs
import pytest
import trio

from supervisor.gateway.auth import Authenticator, load_or_create_secret
from supervisor.gateway.surface import OPERATIONS
from supervisor.settings import Settings
from tests.gateway.browser_kit import CHROMIUM, hosts_of, open_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install the package `chromium`"),
]


@attrs.frozen
class Site:
    """A supervisor that runs: `opens` is the address that it printed, `token` the one in it."""

    url: str
    opens: str
    token: str
    # One tenant's own, with the scope `connect`.
    acme_token: str

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")


@contextlib.asynccontextmanager
async def serve(directory):
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "supervisor", "serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("TENANTRY_")},
            "TENANTRY_BIND": "127.0.0.1:0",
            "TENANTRY_STATE_DIR": str(directory / "state"),
        },
    )
    try:
        printed = b""
        with trio.fail_after(20):
            while not (found := re.search(rb"Open\s+(\S+)\n", printed)):
                more = await process.stdout.receive_some()
                assert more, f"the supervisor ended: {printed!r}"
                printed += more
        opens = found[1].decode()
        url, _, token = opens.partition("/#token=")
        settings = Settings(state_dir=directory / "state")
        authenticator = Authenticator(
            load_or_create_secret(settings.state_dir, settings), settings=settings, addresses=[url]
        )
        own = authenticator.issue(tenant="acme", scopes=["connect"], ttl_s=600, subject="ann")
        yield Site(url, opens, unquote(token), own)
    finally:
        with trio.move_on_after(15, shield=True):
            process.send_signal(signal.SIGTERM)
            await process.wait()
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


@pytest.fixture
async def site(tmp_path):
    async with serve(tmp_path) as running:
        yield running


@pytest.fixture
async def page(tmp_path):
    async with open_browser(tmp_path / "profile") as opened:
        yield opened


async def run_line(page, line: str) -> None:
    await page.wait_for("document.getElementById('prompt').textContent.endsWith('$')")
    await page.click("#line")
    await page.type(line)
    await page.press("Enter")


async def connect(page) -> None:
    await page.click("#connect")
    await page.wait_for_text("#link", "Connected")


def assert_clean(page, site: Site) -> None:
    """Nothing was asked of another host, no address held the token, and the browser had nothing to complain of."""
    assert hosts_of(page.requests) == {site.host}
    assert not [url for url in page.requests if site.token in url or "token=" in url]
    assert [said for said in page.complaints if "status of 404" not in said and "status of 401" not in said] == []


async def test_the_address_that_serve_prints_opens_a_shell_on_an_agent(site, page):
    await page.open(site.opens)
    await page.wait_for_text("#state-word", "Not there yet")
    assert await page.evaluate("location.hash") == ""
    assert site.token not in await page.evaluate("document.documentElement.outerHTML")
    # Looking does not wake, nor create.
    await trio.sleep(1.5)
    assert await page.text("#state-word") == "Not there yet"

    await connect(page)
    await page.wait_for_text("#state-word", "Running")
    await page.wait_for_text("#fact-why", "1 open connection")
    await run_line(page, "echo hello from $TENANTRY_TENANT; echo a problem >&2; mkdir -p deep/er; cd deep")
    await page.wait_for_text("#lines .stdout", "hello from demo\n")
    await page.wait_for_text("#lines .stderr", "a problem\n")
    await run_line(page, "pwd; exit 3")
    await page.wait_for_text("#lines", "/demo/workspace/deep\n")
    await page.wait_for_text("#lines", "exit status 3\n")

    # A command that waits for its input, and one that is interrupted.
    await run_line(page, 'read -r name && echo "name: <$name>"')
    await page.wait_for("!document.getElementById('interrupt').hidden")
    await page.type("ann")
    await page.press("Enter")
    await page.wait_for_text("#lines", "name: <ann>\n")
    await run_line(page, "sleep 600")
    await page.click("#interrupt")
    await page.wait_for_text("#lines", "ended by SIGINT\n")
    await run_line(page, "cat")
    await page.wait_for("!document.getElementById('interrupt').hidden")
    await page.press("d", ctrl=True)
    await page.wait_for("document.getElementById('interrupt').hidden")

    for _ in range(2):
        await page.press("ArrowUp")
    assert await page.evaluate("document.getElementById('line').value") == "sleep 600"
    assert "\u001e" not in await page.text("#lines")
    assert_clean(page, site)


async def test_a_close_is_told_in_words_and_reconnecting_wakes(site, page):
    await page.open(site.opens)
    await connect(page)
    await page.wait_for_text("#fact-connections", "1")
    await page.click("#sleep")
    await page.wait_for_text("#link", "put to sleep")
    await page.wait_for_text("#lines", "closed with 1001")
    await page.wait_for_text("#state-word", "Asleep")
    await trio.sleep(1.5)
    assert await page.text("#state-word") == "Asleep"

    assert await page.text("#connect") == "Reconnect"
    await connect(page)
    await page.wait_for_text("#fact-generation", "2")
    # The agent dies: the page says so, and the next connect has a new one.
    pid = int(await page.wait_for("Number(document.getElementById('fact-pid').textContent)"))
    os.kill(pid, signal.SIGKILL)
    await page.wait_for_text("#lines", "closed with 1012")
    await connect(page)
    await page.wait_for_text("#fact-generation", "3")
    await page.wait_for_text("#fact-exit", "killed by signal 9")
    await run_line(page, "echo back")
    await page.wait_for_text("#lines .stdout", "back\n")

    await page.click("#connect")
    await page.wait_for_text("#link", "you left")
    assert_clean(page, site)


async def test_raw_mode_sends_text_as_it_is_to_any_path(site, page):
    await page.open(site.opens)
    await page.click("input[value=raw]")
    await page.evaluate("document.getElementById('path').value = '/echo'")
    await connect(page)
    await page.type('{"any": "text"} ü')
    await page.press("Enter")
    await page.wait_for_text("#lines .received", '{"any": "text"} ü\n')
    assert_clean(page, site)

    # What the agent does not serve is refused, and the page says what it can know of it.
    await page.click("#connect")
    await page.evaluate("document.getElementById('path').value = 'nowhere'")
    await page.click("#connect")
    await page.wait_for_text("#lines .error", "closed with 1006")


async def test_without_a_token_the_page_asks_for_one(site, page):
    await page.open(site.url)
    await page.wait_for("!document.getElementById('sign-in').hidden")
    for token, then in [("nonsense", "The token was refused"), (site.acme_token, "")]:
        await page.click("#token")
        await page.type(token)
        await page.press("Enter")
        if then:
            await page.wait_for_text("#sign-in-why", then)
    # The token is for one tenant, and so is the page.
    await page.wait_for_text("#state-word", "Not there yet")
    assert await page.evaluate("document.getElementById('name').value") == "acme"
    assert await page.evaluate("document.getElementById('name').readOnly")
    await connect(page)
    await page.wait_for_text("#state-word", "Running")
    # It outlives a reload, and not the asking to forget it.
    await page.open(site.url)
    await page.wait_for_text("#state-word", "Running")
    await page.click("#sign-out")
    await page.wait_for("!document.getElementById('sign-in').hidden")
    assert await page.evaluate("sessionStorage.length") == 0
    assert_clean(page, site)


async def test_output_that_comes_too_fast_does_not_take_the_page_down(site, page):
    await page.open(site.opens)
    await connect(page)
    await run_line(page, "yes 0123456789 | head -c 4000000; echo; echo done")
    await page.wait_for_text("#lines", "done\n")
    assert await page.evaluate("document.getElementById('lines').textContent.length") < 400_000
    await page.wait_for_text("#lines .notice", "came too fast to be shown")
    await run_line(page, "echo still here")
    await page.wait_for_text("#lines", "still here\n")
    assert_clean(page, site)


async def test_the_pages_fit_a_phone_and_the_docs_tell_every_operation(site, page):
    for address in (site.opens, f"{site.url}/docs"):
        await page.open(address)
        if "docs" in address:
            await page.wait_for("document.getElementById('document').getAttribute('aria-busy') === 'false'")
            names = await page.evaluate("[...document.querySelectorAll('details')].map((one) => one.id)")
            assert set(names) == {operation.name for operation in OPERATIONS}
            await page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for dark in (False, True):
            await page.look(width=360, height=700, dark=dark, mobile=True)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        await page.look(width=1280, height=800)
    assert_clean(page, site)
