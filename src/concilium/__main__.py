"""`python -m concilium`."""

from __future__ import annotations

from concilium.cli import main

if __name__ == "__main__":
    main()
