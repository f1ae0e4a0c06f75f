"""Requests that were to blame for what became of workers are refused for a while when the same
tenant sends the same prompt again. Known by fingerprint, so no prompt is kept.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.domain import GenerateRequest, Rejected


@dataclass(slots=True)
class Quarantine:
    """Bounded; in order of the end of each time."""

    config: ControlPlaneConfig
    _until_s: OrderedDict[bytes, float] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, request: GenerateRequest, now_s: float) -> None:
        if not request.fingerprint:
            return
        self._until_s[request.fingerprint] = now_s + self.config.quarantine_s
        self._until_s.move_to_end(request.fingerprint)
        if len(self._until_s) > self.config.quarantined_max:
            self._until_s.popitem(last=False)

    def refuse(self, request: GenerateRequest, now_s: float) -> Rejected | None:
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)
        until_s = self._until_s.get(request.fingerprint)
        if until_s is None:
            return None
        left_s = until_s - now_s
        text = f"the same prompt cost workers before; it is refused for another {left_s:.0f} s"
        return Rejected("poison_request", text, until_s - now_s)
