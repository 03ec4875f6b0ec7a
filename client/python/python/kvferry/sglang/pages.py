"""Which bytes of this process a publication names. Pure: numbers in, ranges out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy

__all__ = ["RANGES_LIMIT", "destinations"]

# Ranges of one revocation. A daemon remembers 4096 (`limits.revocations`), and forgetting one refuses transfers of
# others: the pages of a scattered room are not worth that.
RANGES_LIMIT = 256


def destinations(
    kv_args, kv_indices, aux_index: int | None, state_indices, device_kv_indices=None
) -> list[tuple[int, int]] | None:
    """(address, bytes), neighbours joined, of what prefill may write; None beyond `RANGES_LIMIT`.

    `kv_args` is sglang's KVArgs: for every pool a base address and the bytes of an item, for pages, for auxiliary data
    and for each component of state. Pages are named by `kv_indices`, in some pools by `device_kv_indices`.
    """
    ranges: list[tuple[int, int]] = []
    pages = [indices for indices in (kv_indices, device_kv_indices) if indices is not None]
    named = [
        (base, size, indices) for base, size in zip(kv_args.kv_data_ptrs, kv_args.kv_item_lens) for indices in pages
    ]
    if aux_index is not None:
        named += [(base, size, [aux_index]) for base, size in zip(kv_args.aux_data_ptrs, kv_args.aux_item_lens)]
    for bases, sizes, indices in zip(kv_args.state_data_ptrs, kv_args.state_item_lens, state_indices or []):
        if indices is not None:
            named += [(base, size, indices) for base, size in zip(bases, sizes)]
    for base, size, indices in named:
        ranges += _of_pool(base, size, indices)
        if len(ranges) > RANGES_LIMIT:
            return None
    joined = _joined(ranges)
    return joined if len(joined) <= RANGES_LIMIT else None


def _of_pool(base: int, size: int, indices: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Runs of items that follow each other, at most one more than the limit."""
    items = numpy.unique(numpy.asarray(indices, dtype=numpy.int64))
    if not len(items) or not size:
        return []
    ends = numpy.flatnonzero(numpy.diff(items) != 1)[:RANGES_LIMIT]
    first = numpy.concatenate(([0], ends + 1))
    last = numpy.concatenate((ends, [len(items) - 1]))
    return [(base + int(items[i]) * size, int(items[j] - items[i] + 1) * size) for i, j in zip(first, last)]


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for address, length in sorted(ranges):
        if joined and address <= sum(joined[-1]):
            start, before = joined[-1]
            joined[-1] = (start, max(before, address + length - start))
        else:
            joined.append((address, length))
    return joined
