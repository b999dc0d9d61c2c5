"""How a caller stands with its limits, as headers: OpenAI's x-ratelimit-*, and RateLimit of the IETF's draft 10.

https://platform.openai.com/docs/guides/rate-limits (headers), draft-ietf-httpapi-ratelimit-headers-10.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..speech.gate import Standing

LIMIT_HEADERS = [
    "RateLimit",
    "RateLimit-Policy",
    *(
        f"X-RateLimit-{field}-{kind}"
        for kind in ("Requests", "Characters", "Concurrent")
        for field in ("Limit", "Remaining", "Reset")
        if (field, kind) != ("Reset", "Concurrent")  # nobody knows when
    ),
]

_POLICIES = {
    "requests": "w=60",
    "concurrent": 'qu="concurrent-requests"',
    "characters": 'w=86400;qu="characters"',
}


def limit_headers(standings: Sequence[Standing]) -> dict[str, str]:
    """Empty where there is no limit."""
    if not standings:
        return {}
    headers = {
        "RateLimit-Policy": ", ".join(f'"{s.kind}";q={s.limit};{_POLICIES[s.kind]}' for s in standings),
        "RateLimit": ", ".join(f'"{s.kind}";r={s.left}{_reset(s)}' for s in standings),
    }
    for standing in standings:
        kind = standing.kind
        headers[f"x-ratelimit-limit-{kind}"] = str(standing.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(standing.left)
        if standing.reset is not None:
            headers[f"x-ratelimit-reset-{kind}"] = duration(standing.reset)
    return headers


def _reset(standing: Standing) -> str:
    return "" if standing.reset is None else f";t={-(-standing.reset // 1_000_000)}"


def duration(microseconds: int) -> str:
    """As OpenAI writes it: `6m0s`, `1.25s`, `20ms`, rounded up to milliseconds."""
    milliseconds = -(-microseconds // 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds
