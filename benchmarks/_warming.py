"""What a run does before anything is timed: first calls one by one, then our kernels compiled and the peer tuned, in
parallel.

A row that has to compile takes seconds, and the peer's tuning minutes; device time is dear.
"""

import os
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from benchmarks import _tuning
from benchmarks._plan import Job
from benchmarks._progress import in_parallel, say
from benchmarks._targets import find, sizes
from benchmarks._worker import ROOT, Worker, WorkerError

if TYPE_CHECKING:
    from benchmarks._run import Run

MOST_WARMING = 12  # processes at once: together they must fit in the GPU's memory
WORTH_IT = 3  # fewer units of ours compile faster in the process that is there already


def first_calls(run: "Run") -> None:
    """Time the first call of every op at its first head size, in a fresh process with an empty compile cache.

    One after the other, as a user's: beside three others a first call took 15 s that takes 11 alone.
    """
    wanted: dict[Any, Job] = {}
    for job in run.jobs:
        if not job.baseline:
            wanted.setdefault((job.op, job.form, job.dtype), job)

    def time_one(job: Job) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | dict.fromkeys(("TRITON_CACHE_DIR", "FLA_CACHE_DIR"), cache)
            worker = Worker([sys.executable, "-m", "benchmarks._ours"], str(ROOT), env)
            try:
                request = run.request(job, do="first_call", dims=job.sizes | {"B": 1, "T": 512, "H": 4})
                return worker.ask(request, run.patience())
            except WorkerError as error:
                return {"status": "failed", "why": str(error)}
            finally:
                worker.close()

    found = in_parallel(time_one, list(wanted.values()), 1, "first calls")
    for job, reply in zip(wanted.values(), found, strict=True):
        name = f"first call of {job.form} {job.op}, forward and backward, empty compile cache"
        say(f"{name}: {reply['seconds']:.1f} s" if reply["status"] == "ok" else f"{name}: none, {reply['why']}")
        if reply["status"] == "ok":
            run.first_calls[job.compile_key] = reply["seconds"]


def warm_up(run: "Run") -> None:
    """Compile our kernels and have the peer tune itself: a process for each op and head size of either side.

    What ran out of memory beside the others is tried again alone. `run.warm` then holds the peer's seconds by tuning
    key; a key that is missing there is not tuned, and the peer gets no number for it.
    """
    ours: dict[Any, list[Job]] = {}
    peer: dict[Any, list[Job]] = {}
    for job in run.jobs:
        if not job.baseline:
            ours.setdefault(job.compile_key, []).append(job)
            peer.setdefault(job.tuning_key, []).append(job)
    units = [("ours", unit) for unit in ours.values()] if len(ours) >= WORTH_IT else []
    units += [("peer", unit) for unit in peer.values()] if run.peer_name is not None else []
    end = time.monotonic() + min(run.settings.peer_warm_limit, run.remaining())

    def warm(unit: tuple[str, list[Job]]) -> dict[str, Any]:
        side, jobs = unit
        left = end - time.monotonic()
        if left <= 0:
            return {"status": "failed", "why": "no time left"}
        worker = run.start_peer() if side == "peer" else run.start_ours()
        try:
            reply = worker.ask(describe(run, jobs), left)
        except WorkerError as error:
            reply = {"status": "failed", "why": str(error)}
        finally:
            worker.close()
        how = f"warm after {reply['seconds']:.0f} s" if reply["status"] == "ok" else f"not warm: {reply['why']}"
        say(f"{side}: {jobs[0].form} {jobs[0].op} {', '.join(job.shape for job in jobs)}: {how}")
        return reply

    workers = run.settings.peer_jobs or min(MOST_WARMING, os.cpu_count() or 1)
    replies = in_parallel(warm, units, workers, "warming")
    for number, (unit, reply) in enumerate(zip(units, replies, strict=True)):
        if reply["status"] != "ok" and "OutOfMemory" in reply["why"]:
            replies[number] = warm(unit)
    for (side, jobs), reply in zip(units, replies, strict=True):
        if side == "peer" and reply["status"] == "ok":
            run.warm[jobs[0].tuning_key] = reply["seconds"]
    save = run.settings.save_peer_cache
    if save is not None:
        say(f"peer: {_tuning.save(save, _tuning.triton_cache())} tuning results saved in {save.name}")


def describe(run: "Run", unit: list[Job]) -> dict[str, Any]:
    """The request that warms either side for jobs of one op."""
    job = unit[0]
    target = find(job.op, job.form, run.settings.backend)
    described: dict[str, Any] = {"function": target.name, "settings": target.settings, "gates": target.gates}
    described |= {"all_shapes": [sizes(target.shapes, other.sizes) for other in unit]}
    return run.request(job, do="warm", all_dims=[other.sizes for other in unit], **described)
