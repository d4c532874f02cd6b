"""One run of `benchmarks.ops`: its processes, and a record of every row as soon as it ends."""

import datetime
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import _records as records
from benchmarks import _warming, families
from benchmarks._plan import Job
from benchmarks._progress import progress, say
from benchmarks._sides import Settings, Sides
from benchmarks._worker import ROOT, Worker, WorkerError, WorkerTimeout


@dataclass
class Run:
    """Runs the jobs in order: `run()`."""

    settings: Settings
    jobs: list[Job]
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0

    def __post_init__(self) -> None:
        self.sides = Sides(self.settings)
        self.ours: Worker | None = None
        self.peer: Worker | None = None
        self.warm: dict[Any, float] = {}
        self.first_calls: dict[Any, float] = {}
        self.naive_ms: dict[Any, float] = {}
        self.beside_naive: list[tuple[dict[str, Any], float]] = []  # record, and milliseconds of its naive loop

    def run(self) -> int:
        """Run all jobs and return the exit code. The table is printed also after Ctrl-C or the time limit."""
        code, left = 0, 0
        with tempfile.TemporaryDirectory(dir=in_memory()) as scratch:
            self.sides.scratch = scratch
            try:
                self._prepare()
                for done, job in enumerate(progress(self.jobs, "rows")):
                    left = len(self.jobs) - done
                    self._job(job)
                    left -= 1
            except WorkerTimeout:
                say(f"--time-limit reached: {left or len(self.jobs)} of {len(self.jobs)} jobs not run")
            except KeyboardInterrupt:
                code = 130
            finally:
                for worker in (self.ours, self.peer):
                    if worker is not None:
                        worker.close()
        self._summary()
        numbers = sum(row["ms"] is not None for row in self.rows)
        return code or int(self.failures > 0 or not numbers)

    def _prepare(self) -> None:
        self.info = self._ask_ours({"do": "info", "device": self.settings.device})
        if self.info["status"] != "ok":
            raise RuntimeError(f"the benchmark's process cannot start: {self.info['why']}")
        self.path = self.settings.out / f"{records.slug(self.info['gpu'])}.jsonl"
        self.commit = self.settings.commit or git_commit()
        say(
            f"{self.info['machine']}; torch {self.info['torch']}, triton {self.info['triton']}, commit {self.commit}; "
            f"copy bandwidth {self.info['bandwidth'] / 1e12:.3g} TB/s; records in {self.path.name}"
        )
        if self.settings.first_call:
            self.first_calls = _warming.first_calls(self.sides, self.jobs)
        if self.settings.peer is not None:
            why_not = self.sides.meet_peer()
            if why_not:
                self.failures += 1
                say(f"FAILED: the peer cannot be run: {why_not}")
        if self.settings.device == "cuda":
            self.warm = _warming.warm_up(self.sides, self.jobs)
        if self.sides.peer_name is not None:
            self.peer = self.sides.start_peer()  # it imports while our process computes the first row

    def _ask_ours(self, request: dict[str, Any]) -> dict[str, Any]:
        """Our process's reply; if it died or hung, one with the status `failed`.

        After a failure the next request starts a new process.
        """
        if self.ours is None:
            self.ours = self.sides.start_ours()
        try:
            reply = self.ours.ask(request, self.sides.patience())
        except WorkerError as error:
            self.ours = None
            self.sides.remaining()
            return {"status": "failed", "why": str(error), "rows": {}}
        if reply["status"] == "failed" or reply.get("fatal"):
            self.ours.close()
            self.ours = None
        return reply

    def _job(self, job: Job) -> None:
        beside = self.sides.peer_name is not None and not job.baseline
        peered = beside and families.peer(job.op) is not None
        extra = {"peer": peered, "scratch": self.sides.scratch, "bandwidth": self.info["bandwidth"]}
        ours = self._ask_ours(self.sides.request(job, do="run", **extra))
        peer: dict[str, Any] = {"rows": {}, "why": families.why_no_peer(job.op) if beside and not peered else ""}
        start = time.monotonic()
        stop: BaseException | None = None
        if peered and "checksums" in ours:
            try:
                peer = self._ask_peer(job, ours)
            except (WorkerTimeout, KeyboardInterrupt) as error:
                stop = error  # our side is done: its records are written before the run ends
        if ours["status"] == "failed":
            self.failures += not job.baseline
        for mode in self.settings.modes:
            self._record(job, mode, ours, peer)
        spent = ours.get("seconds", {}) | ({"peer": time.monotonic() - start} if peered else {})
        if spent:
            say("  seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items()))
        if stop is not None:
            raise stop

    def _record(self, job: Job, mode: str, ours: dict[str, Any], peer: dict[str, Any]) -> None:
        row, peer_row = ours["rows"].get(mode, {}), peer["rows"].get(mode, {})
        ms, peer_ms = row.get("ms"), peer_row.get("ms")
        if job.form == "naive" and ms:
            self.naive_ms[_naive_key(job, mode)] = ms
        fields = records.record(
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            commit=self.commit,
            gpu=self.info["gpu"],
            torch=self.info["torch"],
            triton=self.info["triton"],
            op=ours.get("name") or "_".join(filter(None, (job.form, job.op))),
            shape=job.shape,
            dtype=job.dtype,
            mode=mode,
            ms=ms,
            floor_x=ms * 1e-3 / row["floor_s"] if "floor_s" in row else None,
            peak_mb=row.get("peak_mb"),
            first_call_s=self.first_calls.get(job.compile_key),
            peer=self.sides.peer_name if peer_ms else None,
            peer_ms=peer_ms,
            ratio=peer_ms / ms if ms and peer_ms else None,
            note="; ".join(self._notes(job, mode, ours, peer)),
            work_mb=row.get("work_mb"),
            peer_work_mb=peer_row.get("work_mb"),
        )
        records.append(self.path, fields)
        self.rows.append(fields)
        naive = self.naive_ms.get(_naive_key(job, mode))
        if ms and naive and job.form != "naive":
            self.beside_naive.append((fields, naive))
        say(records.line(fields))

    def _notes(self, job: Job, mode: str, ours: dict[str, Any], peer: dict[str, Any]) -> Iterable[str]:
        ms = ours["rows"].get(mode, {}).get("ms")
        if ms is None:
            yield ("FAILED: " if ours["status"] == "failed" else "not run: ") + ours["why"]
        naive = self.naive_ms.get(_naive_key(job, mode))
        if ms and naive and job.form != "naive":
            yield f"{naive / ms:.3g}x the speed of the naive loop"
        if not job.baseline:
            yield f"{ours.get('backend', 'unknown')} backend"
        yield from (f"{name}={value}" for name, value in ours.get("settings", {}).items())
        if self.settings.device == "cpu":
            yield self.info["machine"]
        if self.settings.quick:
            yield "--quick"
        if mode in peer["rows"]:
            if self.sides.guard_lifted and mode == "fwdbwd":
                yield "peer's Triton guard lifted"
            if job.tuning_key in self.warm:
                before = ", tuned before" if self.settings.peer_tuned else ""
                yield f"peer's warm-up {self.warm[job.tuning_key]:.0f} s{before}"
            if not peer.get("error", 0.0) < 0.02:
                yield f"peer's output differs from the reference by {peer['error']:.2g}"
        elif peer["why"]:
            yield f"peer: {peer['why']}"

    def _ask_peer(self, job: Job, ours: dict[str, Any]) -> dict[str, Any]:
        """The peer's times for a job. Raises WorkerTimeout only when the time of the whole run is over."""
        none: dict[str, Any] = {"rows": {}, "why": ""}
        if self.settings.device == "cuda" and job.tuning_key not in self.warm:
            return none | {"why": "not tuned within --peer-warm-limit"}
        if self.peer is None:
            self.peer = self.sides.start_peer()
        handed = {key: ours[key] for key in ("shapes", "replaced", "reference", "checksums")}
        declared = families.peer(job.op)
        if declared is not None:
            handed |= declared.call(ours["name"], ours["settings"])
        try:
            reply = self.peer.ask(self.sides.request(job, do="run", **handed), self.sides.patience())
        except WorkerError as error:
            self.peer = None
            self.sides.remaining()
            return none | {"why": str(error)}
        return none | reply

    def _summary(self) -> None:
        if not self.rows:
            return
        say("")
        say(records.table(self.rows))
        say(
            "ms: median time of a call\n"
            "floors: this time over the memory floor, the time to read every input and write every output once at copy "
            "bandwidth\n"
            "peak MiB: memory beyond the inputs; work MiB: the part of it that is neither outputs nor gradients\n"
            "first call s: first forward and backward with an empty compile cache\n"
            "peer: the other library, in the folder of --peer, on the same inputs; peer/ours: its time over ours"
        )
        if self.failures:
            say(f"FAILED: {self.failures} (the lines above say why)")


def _naive_key(job: Job, mode: str) -> Any:
    return job.op, job.dims, job.dtype, mode


def in_memory(least: int = 8 * 2**30) -> str | None:
    """A folder in memory with `least` bytes free, if any, for what our process hands to the peer's (gates of 1 GB)."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= least
    return str(shared) if roomy else None


def git_commit(folder: Path = ROOT) -> str:
    """The short commit, with `-dirty` if the library differs from it; "unknown" outside a checkout."""
    try:
        found = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "fla"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("-dirty" if found[1] else "")
