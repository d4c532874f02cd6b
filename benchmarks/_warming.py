"""What a run does before it times rows: it times first calls one by one, then compiles our kernels and tunes the peer.

Compiling takes seconds a row, and the peer's tuning takes minutes. Both run in several processes side by side, because
time on a GPU is expensive.
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
WORTH_IT = 3  # fewer groups of our jobs compile sooner in the process that already runs


def first_calls(sides: Sides, jobs: list[Job]) -> dict[Any, float]:
    """Compile key -> seconds of an op's first call at its first head size, in a new process and with an empty cache.

    They run one after the other, as a user's do: beside three others, a first call of 11 s took 15 s.
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
        say(f"{name}: {reply['seconds']:.1f} s" if reply["status"] == "ok" else f"{name}: not timed, {reply['why']}")
        if reply["status"] == "ok":
            seconds[job.compile_key] = reply["seconds"]
    return seconds


def warm_up(sides: Sides, jobs: list[Job]) -> dict[Any, float]:
    """Compile our kernels and have the peer tune itself, in a process for each op and head size of either side.

    A process that ran out of memory beside the others is run again alone. Returns tuning key -> seconds of the peer's
    tuning. Where a key is missing, the peer could not be tuned, and is not timed.
    """
    ours: dict[Any, list[Job]] = {}
    peer: dict[Any, list[Job]] = {}
    for job in jobs:
        if not job.baseline:
            ours.setdefault(job.compile_key, []).append(job)
            if sides.peer_name is not None and families.peer(job.op) is not None:
                peer.setdefault(job.tuning_key, []).append(job)
    groups = [("ours", group) for group in ours.values()] if len(ours) >= WORTH_IT else []
    groups += [("peer", group) for group in peer.values()]
    end = time.monotonic() + min(sides.settings.peer_warm_limit, sides.remaining())

    def warm(on_side: tuple[str, list[Job]]) -> dict[str, Any]:
        side, group = on_side
        left = end - time.monotonic()
        if left <= 0:
            return {"status": "failed", "why": "no time left"}
        worker = sides.start_peer() if side == "peer" else sides.start_ours()
        try:
            reply = worker.ask(describe(sides, group), left)
        except WorkerError as error:
            reply = {"status": "failed", "why": str(error)}
        finally:
            worker.close()
        how = f"ready after {reply['seconds']:.0f} s" if reply["status"] == "ok" else f"not ready: {reply['why']}"
        say(f"{side}: {group[0].form} {group[0].op} {', '.join(job.shape for job in group)}: {how}")
        return reply

    workers = sides.settings.peer_jobs or min(MOST_WARMING, os.cpu_count() or 1)
    replies = in_parallel(warm, groups, workers, "compiling and tuning")
    for number, (on_side, reply) in enumerate(zip(groups, replies, strict=True)):
        if reply["status"] != "ok" and "OutOfMemory" in reply["why"]:
            replies[number] = warm(on_side)
    save = sides.settings.save_peer_cache
    if save is not None:
        say(f"peer: {_tuning.save(save, _tuning.triton_cache())} tuning results saved in {save.name}")
    tuned = [(group[0], r) for (side, group), r in zip(groups, replies, strict=True) if side == "peer"]
    return {job.tuning_key: reply["seconds"] for job, reply in tuned if reply["status"] == "ok"}


def describe(sides: Sides, group: list[Job]) -> dict[str, Any]:
    """The request to either side to compile or tune for jobs of one op."""
    job = group[0]
    target, peer = find(job.op, job.form, sides.settings.backend), families.peer(job.op)
    described: dict[str, Any] = {"gates": target.gates, "all_dims": [other.sizes for other in group]}
    described |= {"all_shapes": [sizes(target.shapes, other.sizes) for other in group]}
    described |= peer.call(target.name, target.settings) if peer is not None else {}
    return sides.request(job, do="warm", **described)
