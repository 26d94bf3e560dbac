"""Whether the layers of a model are run a second time, where nobody says that a step begins."""

from __future__ import annotations


class Rounds:
    """Layers that come one after the other, told by a number each. Not every layer needs one of its own.

    A model that is run again begins with the layer with which it began. In models whose layers share KV caches, some
    come again long before; but these are not the first one's.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._others = False  # whether others have come since

    def begins(self, layer: int) -> bool:
        """Whether a new round begins with this layer: it is the first one again, after others."""
        if self._first is None:
            self._first = layer
        elif layer != self._first:
            self._others = True
        elif self._others:
            self._others = False
            return True
        return False
