"""Gates of the whole suite: enough tests were found, none skipped without a listed reason."""

from pathlib import Path

import pytest

from tests import skips

MINIMUM_FILE = Path(__file__).parent / "expected_minimum.txt"


class SuiteGate:
    """Counts what was collected, in this process or in xdist's, and the skips without a reason."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.num_collected = 0
        self.unlisted: list[str] = []
        self.minimum = int(MINIMUM_FILE.read_text().split()[0])

    @property
    def is_whole_suite(self) -> bool:
        """A run of chosen files or of names counts nothing."""
        return self.config.args in (["tests"], [str(MINIMUM_FILE.parent)]) and not (
            self.config.getoption("keyword") or self.config.getoption("lf", False)
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.num_collected = len(items)
        # Playwright keeps an event loop running from its first use on: asyncio tests go before.
        items.sort(key=is_browser_test)
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["num_collected"] = len(items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        output = getattr(node, "workeroutput", {})
        self.num_collected = max(self.num_collected, output.get("num_collected", 0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            _, _, why = report.longrepr
            if not skips.is_listed(why):
                self.unlisted.append(f"{report.nodeid}: {why}")

    def failures(self) -> list[str]:
        lines = [f"skip without a listed reason: {line}" for line in self.unlisted]
        if self.is_whole_suite and self.num_collected < self.minimum:
            lines.append(
                f"{self.num_collected} tests found, {MINIMUM_FILE.name} expects {self.minimum}"
            )
        return lines

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.failures() and session.exitstatus in (pytest.ExitCode.OK, 5):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.failures():
            terminalreporter.write_line(f"SUITE FAILED {line}", red=True)


class SummaryLines:
    """Prints at the end what tests recorded as property "summary": tables worth reading."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.lines += [line for name, line in report.user_properties if name == "summary"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in sorted(self.lines):
            terminalreporter.write_line(line)


def is_browser_test(item: pytest.Item) -> bool:
    return item.get_closest_marker("browser") is not None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SuiteGate(config), "suite-gate")
    config.pluginmanager.register(SummaryLines(), "summary-lines")
