"""A penalty that grows as a response nears the length limit.

Not in the R1 paper, which lets responses grow: this is the soft over-length punishment of DAPO (arXiv
2503.14476, eq. 13), offered as a term for runs that cannot afford the growth.
"""

from __future__ import annotations


def length_penalty(num_tokens: int, limit: int, buffer: int, *, truncated: bool = False) -> tuple[float, str]:
    """(value in [-1, 0], verdict): 0 up to limit - buffer tokens, then linearly down to -1 at the limit.

    Verdicts: ok | long (inside the buffer) | truncated (cut at the limit, always -1).
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"length buffer {buffer} is not between 1 and the limit of {limit} tokens")
    if truncated or num_tokens > limit:
        return -1.0, "truncated"
    over = num_tokens - (limit - buffer)
    return (0.0, "ok") if over <= 0 else (-over / buffer, "long")
