"""A plugin of pytest that runs the tests of chosen ops alone (`--ops`), and adds up where the seconds go (`--times`).

`tools/suite.py` joins what the processes of a run wrote, and prints it. A test's seconds are those of its setup, call
and teardown, on whichever worker it ran.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from tests import touching

PROPERTY = "touches"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fla")
    group.addoption("--ops", default="", metavar="NAMES", help="only tests that touch these ops, with commas between")
    group.addoption("--times", default="", metavar="FILE", help="write seconds and tests of every op, layer and model")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("times")
    if file and not hasattr(config, "workerinput"):  # a worker's reports reach the process that started it
        config.pluginmanager.register(Times(Path(file)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note in every test what it is about, and drop those of other ops than the chosen ones."""
    chosen = {name for name in config.getoption("ops").split(",") if name}
    if said := touching.unknown_ops(chosen):
        raise pytest.UsageError(said)
    kept, others = [], []
    for item in items:
        said = touching.said_of(item)
        parts = said or touching.used_by(item)
        # files of `tests` itself are about the machinery, on some op or other
        counted = said if item.path.parent.name == "tests" else parts
        shown = touching.counted_under(counted) or [touching.Part("rest", place(item.nodeid))]
        item.user_properties.append((PROPERTY, [tuple(part) for part in shown]))
        of_chosen = not chosen or any(touching.ops_of(part) & chosen for part in parts)
        (kept if of_chosen else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


def place(nodeid: str) -> str:
    """The folder of `tests`, or the file, that a test without a part is counted under."""
    parts = nodeid.split("::")[0].split("/")
    return "/".join(parts[:2])


class Times:
    """Adds up reports, and writes them when the session ends."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.tests: dict[tuple[str, str], float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        parts = dict(report.user_properties).get(PROPERTY) or [("rest", place(report.nodeid))]
        for kind, name in parts:
            self.seconds[kind, name] += report.duration / len(parts)
            self.tests[kind, name] += (report.when == "call") / len(parts)

    def pytest_sessionfinish(self) -> None:
        rows = [[*part, seconds, self.tests[part]] for part, seconds in self.seconds.items()]
        self.file.write_text(json.dumps(rows))
