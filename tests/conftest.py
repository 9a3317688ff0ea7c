"""What every test may ask for: a real federation, where one is at hand, and the built-in phantom."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Read when torch is first imported: the tests of several people, or of several workers, share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from concilium.data.phantom import DEFAULT_SITES, write_phantom

CASES = {"north": 6, "south": 4, "west": 3}
"""Fewer than the phantom has by itself: every case is prepared in every run. One of the north's patients has two."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests come first: what is broken shows soon."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def federation() -> Callable[[str], Path]:
    """`federation(name)`: the folder of a real federation (one nnU-Net raw folder per site), or the test is skipped."""

    def find(name: str) -> Path:
        root = os.environ.get("CONCILIUM_DATA")
        if not root:
            pytest.skip("needs real data: set CONCILIUM_DATA to a folder of federations")
        folder = Path(root) / name
        if not folder.is_dir():
            pytest.skip(f"needs real data: CONCILIUM_DATA holds no federation called {name}")
        return folder

    return find


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in phantom at half size and with fewer cases: one nnU-Net raw folder per site, and `test`. Read only."""
    folder = tmp_path_factory.mktemp("phantom")
    sites = [replace(site, n_cases=CASES[site.name]) for site in DEFAULT_SITES]
    write_phantom(folder, sites=sites, n_test=3, scale=0.5)
    return folder
