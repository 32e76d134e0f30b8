"""Turn: sessions that share a stage have it one exchange at a time, from forward to backward."""

import threading
import time

__all__ = ["TURN_SECONDS", "Turn"]

TURN_SECONDS = 60.0  # how long an open step may keep others waiting before it is given up


class Turn:
    """Whose turn it is on a stage that several sessions share.

    A holder that stays away longer than ``TURN_SECONDS`` while another waits, because its client died between
    forward and backward, loses its turn. So nobody waits for ever, and nobody works on a stage that moved under it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: object | None = None
        self._since = 0.0

    @property
    def taken(self) -> bool:
        """Whether somebody's exchange is open."""
        return self._holder is not None

    def take(self, session: object) -> None:
        """Wait until nobody else holds the turn, or its holder has stayed away too long; then hold it."""
        with self._changed:
            while self._holder is not None and self._holder is not session:
                left = self._since + TURN_SECONDS - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._holder, self._since = session, time.monotonic()

    def keep(self, session: object) -> bool:
        """Return whether ``session`` still holds the turn; if so it has ``TURN_SECONDS`` anew."""
        with self._changed:
            if self._holder is not session:
                return False
            self._since = time.monotonic()
            return True

    def give(self, session: object) -> None:
        """Let the next one in, if ``session`` holds the turn."""
        with self._changed:
            if self._holder is session:
                self._holder = None
                self._changed.notify()

    def void(self) -> None:
        """Take the turn from whoever holds it."""
        with self._changed:
            self._holder = None
            self._changed.notify()
