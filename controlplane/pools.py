"""Workers of one model, kept by side and load so that looking for candidates costs the same in a
cluster of any size.

A side is what a worker's role admits: prompts only, or decoding too. Within a side workers stand in
levels of load; moving one is O(1), and a sample takes one of every level from the least loaded
up, then more of the least loaded. Source of sampling over a full scan: Mitzenmacher 2001, the power
of two choices.
"""

from collections.abc import Callable

from controlplane.config import ControlPlaneConfig
from controlplane.latency import prompt_token_s
from controlplane.registry import Worker

LEVELS = 16


class LoadLevels:
    """The live workers of one side."""

    def __init__(self) -> None:
        self._levels: list[list[Worker]] = [[] for _ in range(LEVELS)]
        self._place: dict[str, tuple[int, int]] = {}  # worker -> level and index in it

    def __len__(self) -> int:
        return len(self._place)

    def put(self, worker: Worker, level: int) -> None:
        place = self._place.get(worker.worker_id)
        if place is not None:
            if place[0] == level:
                return
            self.remove(worker.worker_id)
        self._place[worker.worker_id] = (level, len(self._levels[level]))
        self._levels[level].append(worker)

    def remove(self, worker_id: str) -> None:
        place = self._place.pop(worker_id, None)
        if place is None:
            return
        level, index = self._levels[place[0]], place[1]
        last = level.pop()
        if index < len(level):
            level[index] = last
            self._place[last.worker_id] = place

    def get(self, worker_id: str) -> Worker | None:
        place = self._place.get(worker_id)
        return self._levels[place[0]][place[1]] if place else None

    def level(self, worker_id: str) -> int | None:
        place = self._place.get(worker_id)
        return place[0] if place else None

    def all(self) -> list[Worker]:
        """In order of joining."""
        workers = [worker for level in self._levels for worker in level]
        return sorted(workers, key=lambda worker: (len(worker.worker_id), worker.worker_id))

    def sample(self, count: int, uniform: Callable[[], float]) -> list[Worker]:
        """At most `count` different workers."""
        chosen: dict[str, Worker] = {}
        levels = [level for level in self._levels if level]
        for level in levels[:count]:
            worker = level[int(uniform() * len(level))]
            chosen[worker.worker_id] = worker
        for level in levels:
            start = int(uniform() * len(level))
            for step in range(min(len(level), count)):
                if len(chosen) >= count:
                    return list(chosen.values())
                worker = level[(start + step) % len(level)]
                chosen.setdefault(worker.worker_id, worker)
        return list(chosen.values())


class Pool:
    """The workers of one model; lost ones count for what the model could be asked for."""

    def __init__(self) -> None:
        self.decoders = LoadLevels()
        self.prefillers = LoadLevels()
        self.max_model_len: dict[str, int] = {}  # by worker, lost ones included
        self.kv_tokens: dict[str, int] = {}
        self.away: dict[str, str] = {}  # status of workers that are not live
        self.model_tokens_max = 0  # of the two above, the largest
        self.kv_tokens_max = 0

    def resize(self) -> None:
        self.model_tokens_max = max(self.max_model_len.values(), default=0)
        self.kv_tokens_max = max(self.kv_tokens.values(), default=0)

    def __len__(self) -> int:
        return len(self.max_model_len)


class Pools:
    """One Pool per model; `refile` after any change of a worker's status, role or load."""

    def __init__(self, config: ControlPlaneConfig) -> None:
        self._config = config
        self._pools: dict[str, Pool] = {}
        self._models_of: dict[str, tuple[str, ...]] = {}

    def pool(self, model_id: str) -> Pool | None:
        return self._pools.get(model_id)

    def join(self, worker: Worker) -> None:
        """A new member, or one that is back, maybe with other models."""
        self.forget(worker)
        names = tuple(model.model_id for model in worker.hello.models)
        self._models_of[worker.worker_id] = names
        for model in worker.hello.models:
            pool = self._pools.setdefault(model.model_id, Pool())
            pool.max_model_len[worker.worker_id] = model.max_model_len
            pool.kv_tokens[worker.worker_id] = worker.hello.num_blocks * worker.hello.block_tokens
            pool.resize()
        self.refile(worker)

    def forget(self, worker: Worker) -> None:
        for model_id in self._models_of.pop(worker.worker_id, ()):
            pool = self._pools[model_id]
            pool.decoders.remove(worker.worker_id)
            pool.prefillers.remove(worker.worker_id)
            pool.max_model_len.pop(worker.worker_id, None)
            pool.kv_tokens.pop(worker.worker_id, None)
            pool.away.pop(worker.worker_id, None)
            pool.resize()
            if not len(pool):
                del self._pools[model_id]

    def refile(self, worker: Worker) -> None:
        """Put it where it belongs now."""
        is_live = worker.status == "live"
        level = self.level(worker) if is_live else 0
        for model_id in self._models_of.get(worker.worker_id, ()):
            pool = self._pools[model_id]
            here, there = pool.decoders, pool.prefillers
            if worker.role == "prefill":
                here, there = there, here
            there.remove(worker.worker_id)
            if is_live:
                here.put(worker, level)
                pool.away.pop(worker.worker_id, None)
            else:
                here.remove(worker.worker_id)
                pool.away[worker.worker_id] = worker.status

    def level(self, worker: Worker) -> int:
        """0 for an idle worker, LEVELS - 1 for one that is full in rows, KV or waiting prompts, or
        that gets nothing for another reason."""
        config = self._config
        if worker.is_out:
            return LEVELS - 1
        token_s = prompt_token_s(worker.step_model)
        share = max(
            worker.num_online / config.sequences_max,
            token_s * worker.prefill_tokens_ahead / config.hold_s_min,
            1.0 - worker.blocks_free(False) / worker.hello.num_blocks,
        )
        return min(LEVELS - 1, max(0, int(LEVELS * share)))

    def check_integrity(self, workers: dict[str, Worker]) -> None:
        """Every live worker stands once, on its role's side, at its level, and nobody else does."""
        for worker in workers.values():
            for model_id in self._models_of[worker.worker_id]:
                pool = self._pools[model_id]
                here, there = pool.decoders, pool.prefillers
                if worker.role == "prefill":
                    here, there = there, here
                assert there.get(worker.worker_id) is None, worker.worker_id
                is_live = worker.status == "live"
                assert (here.get(worker.worker_id) is worker) == is_live, worker.worker_id
                level = self.level(worker) if is_live else None
                assert here.level(worker.worker_id) == level, (worker.worker_id, level)
        assert set(self._models_of) == set(workers), (self._models_of, list(workers))
