"""Ports for servers that are told where to listen, or come back there after their death."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, outside the range that the system takes for connections.

    One of that range may belong to some connection by the time it is bound, or again; and who asks there for a server
    that is dead may, by chance, be connected to himself.
    """
    taken = range(32768, 61000)
    if _RANGE.exists():
        first, last = map(int, _RANGE.read_text().split())
        taken = range(first, last + 1)
    candidates = [port for port in range(10_000, 65_000) if port not in taken]
    for port in random.SystemRandom().sample(candidates, min(100, len(candidates))):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port was found")
