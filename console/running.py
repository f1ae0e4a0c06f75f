"""Requests of `/v1` that run now, by key: a key that is switched off takes its streams with it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from django.utils import timezone

from console import auth
from console.apierrors import ApiError
from console.snapshot import Snapshot

REVOKED = ApiError(401, "invalid_api_key", "The API key has been switched off.", should_retry=False)

CANCELLED = ApiError(
    503, "cancelled_by_operator", "An operator has cancelled this request.", should_retry=False
)

Stop = asyncio.Future[ApiError]  # done when the request must end before its answer does


class RunningRequests:
    """Touched on the event loop only."""

    def __init__(self) -> None:
        self.used_at: dict[str, datetime] = {}  # since `take_used`, by public id
        self._stops: dict[str, set[Stop]] = {}  # by public id; at most the requests in flight
        self._by_request: dict[str, Stop] = {}  # at most the requests in flight
        self._checked: Snapshot | None = None

    @contextmanager
    def running(self, key_id: str, request_id: str) -> Iterator[Stop]:
        """While a request of the key runs."""
        stop: Stop = asyncio.get_running_loop().create_future()
        stops = self._stops.setdefault(key_id, set())
        stops.add(stop)
        self._by_request[request_id] = stop
        self.used_at[key_id] = timezone.now()
        try:
            yield stop
        finally:
            stop.cancel()
            stops.discard(stop)
            if self._by_request.get(request_id) is stop:
                del self._by_request[request_id]
            if not stops:
                del self._stops[key_id]

    def cancel(self, request_id: str) -> bool:
        """End a request on an operator's word, whole, also by the id of one of its choices; False
        when it does not run here."""
        whole_id = request_id.rpartition("-")[0]
        stop = self._by_request.get(request_id) or self._by_request.get(whole_id)
        if stop is None or stop.done():
            return False
        stop.set_result(CANCELLED)
        return True

    def check(self, snapshot: Snapshot) -> int:
        """End what runs with keys that are not good any more; the number of requests ended."""
        if snapshot is self._checked:
            return 0
        self._checked = snapshot
        num_ended = 0
        for key_id, stops in self._stops.items():
            facts = snapshot.keys.get(key_id)
            if facts is not None and auth.is_good(snapshot, facts):
                continue
            for stop in stops:
                if not stop.done():
                    stop.set_result(REVOKED)
                    num_ended += 1
        return num_ended

    def take_used(self) -> dict[str, datetime]:
        """When which key was used since the last call."""
        used, self.used_at = self.used_at, {}
        return used
