"""Settings under test: a var folder of their own, and no database, broker or key of the shell."""

import os
import tempfile

for name in ("DATABASE_URL", "REDIS_URL", "ALLOWED_HOSTS", "SECRET_KEY", "SLACKWATER_PEPPER"):
    os.environ.pop(name, None)
os.environ["SLACKWATER_VAR"] = tempfile.mkdtemp(prefix="slackwater-test-")
# One thread per test process, as in a worker: two cores serve two test processes.
os.environ["OMP_NUM_THREADS"] = "1"

from console.settings import *  # noqa: E402, F403
