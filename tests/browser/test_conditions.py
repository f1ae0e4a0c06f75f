"""The console on a narrow screen, without load, and when its server goes away."""

import re

import pytest

from tests.browser.conftest import begin, open_page
from tests.browser.test_console import counter, eventually, send_one, wait_live
from tests.e2e.harness import until

pytestmark = [pytest.mark.browser, pytest.mark.serial]
NARROW = 390
PAGES = (
    "/",
    "/requests/",
    "/requests/history/?demo=on",
    "/workers/",
    "/workers/add/",
    "/workers/w1/role/",
    "/playground/",
    "/batches/",
)


def overflow(page):
    """Pixels by which the page is wider than the screen."""
    return page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone(browser, server, scheme):
    send_one(server)
    page, complaints = open_page(browser, server, scheme, NARROW)
    for path in PAGES:
        page.goto(server.url + path)
        assert overflow(page) == 0, path
    page.goto(server.url + "/requests/history/")
    page.click("tbody a")
    assert overflow(page) == 0 and "Decisions" in page.text_content("body")
    page.close()
    assert complaints.messages == []


def test_status_does_not_rest_on_colour_alone(session):
    wait_live(session)
    for badge in session.query_selector_all(".status"):
        assert badge.query_selector("svg use") and badge.text_content().strip()


def test_a_page_whose_server_is_gone_turns_grey_says_its_age_and_comes_back(browser, tmp_path):
    server = begin(tmp_path / "var")
    page, _ = open_page(browser, server)
    wait_live(page)
    port = server.port
    server.stop()
    eventually(page, "document.body.classList.contains('is-stale')")
    assert re.fullmatch(r"stale · \d+ (s|min)", page.text_content("#live-pill"))
    server.start(num_workers=None, port=port)
    until(lambda: "live" in page.text_content("#live-pill"), "the page to be live again", 75)
    page.close()
    server.stop()


@pytest.mark.slow
def test_without_load_every_live_number_goes_to_zero_or_no_data(session, server):
    wait_live(session)
    before = counter(session, "requests_total")
    send_one(server)
    until(lambda: counter(session, "requests_total") > before, "the request to be counted", 10)
    rest = """[...document.querySelectorAll('.live [data-live]')]
      .filter((cell) => !cell.dataset.live.startsWith('counters/'))
      .map((cell) => cell.textContent)
      .filter((text) => !['0', '0 ms', '0 %', 'no data'].includes(text))"""
    until(lambda: session.evaluate(rest) == [], "windows of a minute to empty", 80)
    assert counter(session, "requests_total") > before  # since start, not of the window
