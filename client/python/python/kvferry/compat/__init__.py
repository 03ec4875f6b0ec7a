"""Stands where users of Mooncake's transfer engine expect it.

`PYTHONPATH=$(python -m kvferry.compat --path)` puts a package `mooncake` first whose `engine` is kvferry's; whatever
else an installed `mooncake` has (`mooncake.store` and so on) still resolves. Unset the variable to go back.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> str:
    """The folder for PYTHONPATH."""
    return str(Path(__file__).with_name("path"))
