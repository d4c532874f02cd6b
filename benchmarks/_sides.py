"""The two sides of a run, our ops and the peer: how their processes start, what they are asked, their time limits."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._plan import Job
from benchmarks._worker import ROOT, Worker, WorkerError, WorkerTimeout

ROW_LIMIT = {"cuda": 150.0, "cpu": 600.0}  # seconds that a side may take for a job: one that takes longer is broken


@dataclass(frozen=True)
class Settings:
    """The command line, with its defaults filled in."""

    device: str
    modes: tuple[str, ...]
    backend: str | None
    seed: int
    budget: tuple[float, int]
    quick: bool
    out: Path
    commit: str | None
    time_limit: float
    first_call: bool
    peer: Path | None
    peer_jobs: int | None
    peer_warm_limit: float
    peer_tuned: bool = False  # whether its tuning came from a file
    save_peer_cache: Path | None = None


class Sides:
    """What both sides share: the settings, the time that is left, and `scratch`, a folder for exchanging files."""

    def __init__(self, settings: Settings, scratch: str = "") -> None:
        self.settings, self.scratch = settings, scratch
        self.end = time.monotonic() + settings.time_limit
        self.peer_name: str | None = None  # None: there is no peer
        self.guard_lifted = False

    def remaining(self) -> float:
        """Seconds left. Raises WorkerTimeout when there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise WorkerTimeout("--time-limit")
        return left

    def patience(self) -> float:
        """Seconds to wait for one answer."""
        return min(self.remaining(), ROW_LIMIT[self.settings.device])

    def request(self, job: Job, **fields: Any) -> dict[str, Any]:
        """The request about a job that either side's process gets."""
        s = self.settings
        common = {"op": job.op, "form": job.form, "dims": job.sizes, "dtype": job.dtype, "backend": s.backend}
        return common | {"device": s.device, "modes": s.modes, "seed": s.seed, "budget": s.budget} | fields

    def start_ours(self, env: dict[str, str] | None = None) -> Worker:
        """Start a process for our ops."""
        return Worker([sys.executable, "-m", "benchmarks._ours"], str(ROOT), env)

    def start_peer(self) -> Worker:
        """Start a process for the peer."""
        path = str(self.settings.peer)
        inherited = os.environ.get("PYTHONPATH")
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (path, inherited)))}
        script = str(Path(__file__).with_name("_peer.py"))
        return Worker([sys.executable, script, "--path", path], self.scratch, env)

    def meet_peer(self) -> str:
        """Ask the peer for its name, in a process of its own. Returns "", or the reason why it cannot be run."""
        worker = self.start_peer()
        try:
            who = worker.ask({"do": "info"}, self.patience())
        except WorkerError as error:
            self.remaining()
            who = {"status": "failed", "why": str(error)}
        worker.close()
        if who["status"] != "ok":
            return who["why"]
        self.peer_name, self.guard_lifted = who["peer"], who["guard_lifted"]
        return ""
