"""Every test begins with the same random numbers; faults survived are told at the end: a toothless suite shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, [])]
    told = [(name, value) for one in reports if one.when == "call" for name, value in one.user_properties]
    if told:
        terminalreporter.section("faults")
    for name in dict.fromkeys(name for name, _ in told):
        terminalreporter.write_line(f"{name}: {', '.join(str(value) for other, value in told if other == name)}")
