"""The transfer engine that callers of `mooncake.engine` expect, on kvferry."""

from kvferry.compat.engine import TransferEngine

__all__ = ["TransferEngine"]
