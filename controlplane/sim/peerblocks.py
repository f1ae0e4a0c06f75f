"""KV blocks of one worker of the peer: prefixes are shared, those nobody uses go oldest first."""

from collections.abc import Sequence

Name = int  # of a whole prefix, from the trace


class PeerBlocks:
    """Counts blocks; only a prompt's full ones have names, under which others find them."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._users: dict[Name, int] = {}
        self._idle: dict[Name, None] = {}  # nobody uses them; the first to go stand first
        self._unnamed = 0  # in use

    @property
    def num_active(self) -> int:
        return len(self._users) + self._unnamed

    @property
    def num_available(self) -> int:
        """Blocks that a sequence could get, those kept for their prefix included."""
        return self.num_blocks - self.num_active

    def cached(self, names: Sequence[Name]) -> int:
        """How many of a prompt's first blocks are here."""
        users, idle = self._users, self._idle
        for index, name in enumerate(names):
            if name not in users and name not in idle:
                return index
        return len(names)

    def num_shared(self, names: Sequence[Name]) -> int:
        """How many of these somebody uses: to share them takes no room."""
        return sum([name in self._users for name in names])

    def use(self, names: Sequence[Name], unnamed: int = 0) -> None:
        """Take blocks that are there, or new ones under these names, and some without a name."""
        for name in names:
            self._idle.pop(name, None)
            self._users[name] = self._users.get(name, 0) + 1
        self._unnamed += unnamed
        assert self.num_available >= 0, f"{-self.num_available} more blocks than there are"
        while len(self._idle) > self.num_available:
            del self._idle[next(iter(self._idle))]

    def name(self, names: Sequence[Name]) -> None:
        """Blocks that were used without a name have got their prefix."""
        self._unnamed -= len(names)
        self.use(names)

    def free(self, names: Sequence[Name], unnamed: int) -> None:
        """A sequence gives its blocks back; its last ones go first."""
        self._unnamed -= unnamed
        for name in reversed(names):
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self._idle[name] = None
