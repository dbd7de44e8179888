"""Peak memory where there is no /proc: the unit of the kernel's counter differs between systems."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from research_rl.pipeline import meter


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_the_peak_is_in_bytes(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5000))
    assert meter.peak_bytes() == 5000 * unit


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 0 s"),
        (200.4, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (219_900, "61 h 5 min"),
    ],
)
def test_a_duration_is_in_the_units_that_people_use(seconds: float, expected: str) -> None:
    """A training of two days and a half stood as "219,900 s" in the status, and as hours in the report."""
    assert meter.duration(seconds) == expected
    assert meter.moment("2026-11-27T09:30:59+00:00") == "2026-11-27 09:30"
