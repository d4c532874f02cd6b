"""Worker processes, which answer requests of one JSON line each.

A crash or a hang costs one row, and no process holds both packages that are called `fla`, ours and the peer's.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Handler = Callable[[dict[str, Any]], dict[str, Any]]


class WorkerError(RuntimeError):
    """A worker died or did not answer in time. It is ended, and a new one may be started."""


class WorkerTimeout(WorkerError):
    """A worker did not answer in time."""


def serve(handlers: dict[str, Handler], setup: Callable[[], None] | None = None) -> None:
    """Answer requests on stdin, one JSON line each: `{"do": name, ...}`. What handlers print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if setup is not None:
        setup()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = handlers[request["do"]](request)
        except Exception as error:
            traceback.print_exc()
            reply = {"status": "failed", "why": one_line(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class Worker:
    """A process that answers, as the asking side sees it. `command` must call `serve`."""

    def __init__(self, command: list[str], cwd: str, env: dict[str, str] | None = None) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.replies: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put(None)

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply to one request.

        Raises WorkerTimeout after `timeout` seconds, and WorkerError if the worker died.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.replies.get(timeout=max(timeout, 0.0))
        except BrokenPipeError:
            line = None
        except queue.Empty:
            self.close()
            raise WorkerTimeout(f"no answer within {timeout:.0f} s") from None
        if line is None:
            code = self.process.wait()
            self.log.seek(0)
            last = [x.strip() for x in self.log.read().splitlines() if x.strip()][-1:]
            self.close()
            raise WorkerError(f"the process ended with code {code}: {' '.join(last)[:300]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(timeout=5)
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
