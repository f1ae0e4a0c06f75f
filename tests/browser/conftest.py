"""A real server with two modelled workers, and a Chromium that an operator has signed in to."""

import json
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests import skips
from tests.e2e.harness import Server

ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
OPTIONS = ("--workers", "prefill=1,decode=1", "--engine", "fake", "--profile", "h200-8b")
# Beside the console's own messages, for policies whose breach Chromium does not print.
WATCH = """
window.__violations = [];
document.addEventListener("securitypolicyviolation",
  (event) => window.__violations.push(event.violatedDirective + " " + event.blockedURI));
"""


@dataclass
class Complaints:
    """What went wrong in the browser, and which hosts it asked."""

    messages: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def listen(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.messages.append(f"error {error}"))
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.on("response", self._response)

    def _console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.messages.append(f"{message.type} {message.text}")

    def _response(self, response) -> None:
        if response.status >= 400:
            self.messages.append(f"{response.status} {response.url}")


@pytest.fixture(scope="session")
def browser():
    path = skips.chromium_path()
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield made
        made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser):
    """Started after the browser, so that a machine without one does not start it."""
    served = begin(tmp_path_factory.mktemp("var"))
    yield served
    served.stop()


def begin(var) -> Server:
    """A served console with the operator `ada`."""
    served = Server(var, OPTIONS)
    served.seed()
    made = served.manage("operator", "create", "ada", "--json")
    assert made.returncode == 0, made.stderr
    served.password = json.loads(made.stdout)["password"]
    return served.start()


def sign_in(page: Page, server: Server) -> None:
    """Through the login form, to Overview."""
    page.goto(server.url + "/")
    page.fill("#id_username", "ada")
    page.fill("#id_password", server.password)
    page.click("input[type=submit]")
    page.wait_for_url(server.url + "/")


def open_page(browser: Browser, server: Server, scheme="light", width=1440):
    """A signed-in page on Overview; pages of one scheme and width share their context's cache."""
    known = server.__dict__.setdefault("contexts", {})
    context = known.get((scheme, width))
    if context is None:
        viewport = {"width": width, "height": 900 if width > 600 else 844}
        storage = server.__dict__.get("storage")
        context = browser.new_context(
            color_scheme=scheme, viewport=viewport, storage_state=storage, locale="en-US"
        )
        known[scheme, width] = context
    page, complaints = context.new_page(), Complaints()
    page.add_init_script(WATCH)
    complaints.listen(page)
    if "storage" in server.__dict__:
        page.goto(server.url + "/")
    else:
        sign_in(page, server)
        server.storage = context.storage_state()
    return page, complaints


@pytest.fixture
def scheme():
    """Light unless a test asks for both."""
    return "light"


@pytest.fixture
def session(browser, server, scheme):
    """A signed-in page on Overview; at its end nobody may have complained."""
    page, complaints = open_page(browser, server, scheme)
    yield page
    violations = page.evaluate("window.__violations")
    page.close()
    assert complaints.messages == [] and violations == []
    assert complaints.hosts == {f"127.0.0.1:{server.port}"}
