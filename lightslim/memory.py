"""What the C library does with memory that a step frees."""

import functools

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what one step frees for the next one, instead of having it zeroed by the system each time.

    glibc keeps twice as much as the largest block, of 32 MiB at most, that it had mapped by itself and that was freed:
    from here on up to 62 MiB, for as long as the process lives. Other C libraries do not mind.
    """
    torch.UntypedStorage(31 * 2**20)  # no tensor operation, which somebody might watch
