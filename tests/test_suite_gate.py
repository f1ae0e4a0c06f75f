"""The suite's own gates: a lost test or a quiet skip fails the run."""

from types import SimpleNamespace

import pytest

from tests import skips
from tests.conftest import MINIMUM_FILE, SuiteGate, SummaryLines


class Config(SimpleNamespace):
    """What the gate asks of pytest's configuration."""

    def getoption(self, name, default=None):
        return self.options.get(name, default)


class Item(SimpleNamespace):
    """A collected test with or without the marker of browser tests."""

    browser: bool = False

    def get_closest_marker(self, name):
        return name if name == "browser" and self.browser else None


def gate(args=("tests",), **options):
    return SuiteGate(Config(args=list(args), options=options))


def report(why=None, outcome="skipped"):
    return SimpleNamespace(
        nodeid="tests/test_x.py::test_y",
        skipped=outcome == "skipped",
        longrepr=("tests/test_x.py", 3, why),
    )


def test_fewer_tests_than_expected_fail_the_whole_suite():
    suite = gate()
    suite.pytest_collection_modifyitems([Item()] * (suite.minimum - 1))
    assert suite.failures() == [
        f"{suite.minimum - 1} tests found, {MINIMUM_FILE.name} expects {suite.minimum}"
    ]
    suite.pytest_collection_modifyitems([Item()] * suite.minimum)
    assert suite.failures() == []


@pytest.mark.parametrize(
    ("args", "options"),
    [(["tests/test_locks.py"], {}), (["tests"], {"keyword": "locks"}), (["tests"], {"lf": True})],
)
def test_a_part_of_the_suite_counts_nothing(args, options):
    suite = gate(args, **options)
    suite.pytest_collection_modifyitems([Item()])
    assert suite.failures() == []


def test_browser_tests_run_last_and_others_keep_their_order():
    items = [Item(n=1), Item(n=2, browser=True), Item(n=3), Item(n=4, browser=True)]
    gate().pytest_collection_modifyitems(items)
    assert [item.n for item in items] == [1, 3, 2, 4]


def test_the_count_of_an_xdist_process_is_the_controllers():
    suite = gate()
    suite.pytest_testnodedown(SimpleNamespace(workeroutput={"num_collected": suite.minimum}))
    suite.pytest_testnodedown(SimpleNamespace())  # a process that crashed
    assert suite.failures() == []


def test_a_skip_without_a_listed_reason_fails_the_run():
    suite = gate(["tests/test_x.py"])
    suite.pytest_runtest_logreport(report("Skipped: later"))
    assert suite.failures() == [
        "skip without a listed reason: tests/test_x.py::test_y: Skipped: later"
    ]
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    suite.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("need", skips.NEEDS.values(), ids=lambda need: need.what)
def test_a_listed_skip_passes_and_has_a_date(need):
    suite = gate(["tests/test_x.py"])
    suite.pytest_runtest_logreport(report(f"Skipped: {skips.reason(need)}"))
    suite.pytest_runtest_logreport(report(outcome="passed"))
    assert suite.failures() == []
    assert len(need.since) == 10


def test_a_missing_thing_skips_with_one_line_that_names_the_package(monkeypatch):
    monkeypatch.delenv("SLACKWATER_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="^SKIP chromium: install chromium$"):
        skips.missing("chromium")


def test_a_required_thing_that_is_missing_fails(monkeypatch):
    monkeypatch.setenv("SLACKWATER_REQUIRE", "services,browser")
    with pytest.raises(pytest.fail.Exception, match="SLACKWATER_REQUIRE names browser"):
        skips.missing("chromium")
    monkeypatch.setenv("SLACKWATER_REQUIRE", "services")
    with pytest.raises(pytest.skip.Exception):
        skips.missing("chromium")


def test_a_service_is_only_one_that_was_named(monkeypatch):
    monkeypatch.delenv("SLACKWATER_REQUIRE", raising=False)
    monkeypatch.delenv("SLACKWATER_TEST_REDIS_URL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="redis-server and name it"):
        skips.service_url("SLACKWATER_TEST_REDIS_URL")
    monkeypatch.setenv("SLACKWATER_TEST_REDIS_URL", "redis://127.0.0.1:1")
    assert skips.service_url("SLACKWATER_TEST_REDIS_URL") == "redis://127.0.0.1:1"


def test_lines_that_tests_recorded_are_printed_once_in_order():
    summary, printed = SummaryLines(), []
    for when in ("setup", "call", "teardown"):
        properties = [("summary", "b 2"), ("other", "x"), ("summary", "a 1")]
        summary.pytest_runtest_logreport(SimpleNamespace(when=when, user_properties=properties))
    summary.pytest_terminal_summary(SimpleNamespace(write_line=printed.append))
    assert printed == ["a 1", "b 2"]
