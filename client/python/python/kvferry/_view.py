"""A memoryview of a buffer, without numpy. The stable ABI has no buffer protocol before CPython 3.11."""

import ctypes


def view(buffer):
    array = (ctypes.c_ubyte * len(buffer)).from_address(buffer.address)
    # The view holds the array, and the array holds the memory.
    array.owner = buffer
    return memoryview(array).cast("B")
