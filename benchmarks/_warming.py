"""What a run does before anything is timed: first calls one by one, then our kernels compiled and the peer tuned, in
parallel.

A row that has to compile takes seconds, and the peer's tuning minutes; device time is dear.
"""

import os
import tempfile
import time
from typing import Any

from benchmarks import _tuning, families
from benchmarks._plan import Job
from benchmarks._progress import in_parallel, say
from benchmarks._shapes import sizes, with_few
from benchmarks._sides import Sides
from benchmarks._targets import find
from benchmarks._worker import WorkerError

MOST_WARMING = 12  # processes at once: together they must fit in the GPU's memory
WORTH_IT = 3  # fewer units of ours compile faster in the process that is there already


def first_calls(sides: Sides, jobs: list[Job]) -> dict[Any, float]:
    """Seconds of the first call of every op at its first head size, in a fresh process with an empty compile cache.
    By compile key.

    One after the other, as a user's: beside three others a first call took 15 s that takes 11 alone.
    """
    wanted: dict[Any, Job] = {}
    for job in jobs:
        if not job.baseline:
            wanted.setdefault((job.op, job.form, job.dtype), job)

    def time_one(job: Job) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | dict.fromkeys(("TRITON_CACHE_DIR", "FLA_CACHE_DIR"), cache)
            worker = sides.start_ours(env)
            try:
                request = sides.request(job, do="first_call", dims=with_few(job.sizes, batch=1, tokens=512, heads=4))
                return worker.ask(request, sides.patience())
            except WorkerError as error:
                return {"status": "failed", "why": str(error)}
            finally:
                worker.close()

    seconds: dict[Any, float] = {}
    found = in_parallel(time_one, list(wanted.values()), 1, "first calls")
    for job, reply in zip(wanted.values(), found, strict=True):
        name = f"first call of {job.form} {job.op}, forward and backward, empty compile cache"
        say(f"{name}: {reply['seconds']:.1f} s" if reply["status"] == "ok" else f"{name}: none, {reply['why']}")
        if reply["status"] == "ok":
            seconds[job.compile_key] = reply["seconds"]
    return seconds


def warm_up(sides: Sides, jobs: list[Job]) -> dict[Any, float]:
    """Compile our kernels and have the peer tune itself: a process for each op and head size of either side.

    What ran out of memory beside the others is tried again alone. Returns the peer's seconds by tuning key: a key that
    is missing there is not tuned, and the peer gets no number for it.
    """
    ours: dict[Any, list[Job]] = {}
    peer: dict[Any, list[Job]] = {}
    for job in jobs:
        if not job.baseline:
            ours.setdefault(job.compile_key, []).append(job)
            if sides.peer_name is not None and families.peer(job.op) is not None:
                peer.setdefault(job.tuning_key, []).append(job)
    units = [("ours", unit) for unit in ours.values()] if len(ours) >= WORTH_IT else []
    units += [("peer", unit) for unit in peer.values()]
    end = time.monotonic() + min(sides.settings.peer_warm_limit, sides.remaining())

    def warm(unit: tuple[str, list[Job]]) -> dict[str, Any]:
        side, same = unit
        left = end - time.monotonic()
        if left <= 0:
            return {"status": "failed", "why": "no time left"}
        worker = sides.start_peer() if side == "peer" else sides.start_ours()
        try:
            reply = worker.ask(describe(sides, same), left)
        except WorkerError as error:
            reply = {"status": "failed", "why": str(error)}
        finally:
            worker.close()
        how = f"warm after {reply['seconds']:.0f} s" if reply["status"] == "ok" else f"not warm: {reply['why']}"
        say(f"{side}: {same[0].form} {same[0].op} {', '.join(job.shape for job in same)}: {how}")
        return reply

    workers = sides.settings.peer_jobs or min(MOST_WARMING, os.cpu_count() or 1)
    replies = in_parallel(warm, units, workers, "warming")
    for number, (unit, reply) in enumerate(zip(units, replies, strict=True)):
        if reply["status"] != "ok" and "OutOfMemory" in reply["why"]:
            replies[number] = warm(unit)
    save = sides.settings.save_peer_cache
    if save is not None:
        say(f"peer: {_tuning.save(save, _tuning.triton_cache())} tuning results saved in {save.name}")
    tuned = [(same[0], r) for (side, same), r in zip(units, replies, strict=True) if side == "peer"]
    return {job.tuning_key: reply["seconds"] for job, reply in tuned if reply["status"] == "ok"}


def describe(sides: Sides, unit: list[Job]) -> dict[str, Any]:
    """The request that warms either side for jobs of one op."""
    job = unit[0]
    target, peer = find(job.op, job.form, sides.settings.backend), families.peer(job.op)
    described: dict[str, Any] = {"gates": target.gates, "all_dims": [other.sizes for other in unit]}
    described |= {"all_shapes": [sizes(target.shapes, other.sizes) for other in unit]}
    described |= peer.call(target.name, target.settings) if peer is not None else {}
    return sides.request(job, do="warm", **described)
