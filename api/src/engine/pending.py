"""Results that a device is still making while the host goes on.

Owns the word alone; where there is a device, lanes.py makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A result to come."""

    def ready(self) -> bool:
        """Whether `get` would not wait."""
        ...

    def get(self) -> T_co:
        """The result, once it is there. To be called once; raises what went wrong."""
        ...


@dataclass(frozen=True)
class Made(Generic[T]):
    """One that is there already."""

    value: T

    def ready(self) -> bool:
        """As Pending."""
        return True

    def get(self) -> T:
        """As Pending."""
        return self.value
