"""The two sides of a run, ours and the peer's: how their processes start, what they are asked, how long they have."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._plan import Job
from benchmarks._worker import ROOT, Worker, WorkerError, WorkerTimeout

ROW_LIMIT = {"cuda": 150.0, "cpu": 600.0}  # seconds for one side of one job; what takes longer is broken


@dataclass(frozen=True)
class Settings:
    """The command line, resolved."""

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
    peer_tuned: bool = False  # its tuning came from a file
    save_peer_cache: Path | None = None


class Sides:
    """What both sides of a run share: the settings, the time that is left, and a folder for what they hand over."""

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
        """What either side's process is asked about a job."""
        s = self.settings
        common = {"op": job.op, "form": job.form, "dims": job.sizes, "dtype": job.dtype, "backend": s.backend}
        return common | {"device": s.device, "modes": s.modes, "seed": s.seed, "budget": s.budget} | fields

    def start_ours(self, env: dict[str, str] | None = None) -> Worker:
        """A process of ours."""
        return Worker([sys.executable, "-m", "benchmarks._ours"], str(ROOT), env)

    def start_peer(self) -> Worker:
        """A process of the peer's."""
        path = str(self.settings.peer)
        behind = os.environ.get("PYTHONPATH")
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (path, behind)))}
        script = str(Path(__file__).with_name("_peer.py"))
        return Worker([sys.executable, script, "--path", path], self.scratch, env)

    def meet_peer(self) -> str:
        """Ask the peer who it is, in a process of its own. Returns why it cannot be run, or ""."""
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
