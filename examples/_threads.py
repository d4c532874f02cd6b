"""Chooses the number of threads of a training step: as many as make steps quicker. It times the steps of the training.

PyTorch divides every operation among its threads and waits for the last of them. If other programs use the cores, one
of the threads is always waiting for its turn, and a step of two threads may take twenty times as long as one of one.
"""

import statistics
from collections.abc import Callable

import torch

TRIAL = 4  # steps of a trial of another number of threads; the first one is not counted
GAIN = 1.05  # more threads are kept if steps are so many times as fast
LOST = 1.5  # a step of so many times the expected seconds ends a trial; the first step may take twice that
RECENT = 5  # so many steps in a row must take too long before fewer threads are tried
PATIENCE = 50  # steps until more threads are tried again; it doubles after every trial that did not help


class Threads:
    """The caller reports every step with `seen(seconds)`; the next step uses `count` threads."""

    def __init__(self, most: int, least: int = 1, use: Callable[[int], None] = torch.set_num_threads) -> None:
        self.counts = [2**i for i in range(most.bit_length()) if least <= 2**i < most] + [most]
        self.use = use
        self.at = self.best = 0  # places in `counts`: of the number in use, and of the best so far
        self.pace = 0.0  # seconds of a step with the best number; 0 before it is known
        self.steps: list[float] = []  # seconds of the steps since the number in use was chosen
        self.patience, self.waited = PATIENCE, 0
        use(self.count)

    @property
    def count(self) -> int:
        return self.counts[self.at]

    def seen(self, seconds: float) -> None:
        """Record the seconds of a step, and choose the number of threads for the next one."""
        self.steps.append(seconds)
        if not self.pace:  # the first number of threads has nothing to be compared with
            if len(self.steps) == TRIAL:
                self.keep()
        elif self.at != self.best:
            self.judge()
        elif self.at and len(self.steps) >= RECENT and min(self.steps[-RECENT:]) > LOST * self.pace:
            self.pace = statistics.median(self.steps[-RECENT:])
            self.try_at(self.at - 1)
        else:
            self.waited += 1
            if self.waited >= self.patience:
                self.pace = statistics.median(self.steps[-RECENT:])
                self.try_more()

    def judge(self) -> None:
        """In a trial: keep the number that is tried, or go back, as soon as either is clear."""
        more, counted = self.at > self.best, self.steps[1:]
        if self.steps[-1] > (LOST if counted else 2 * LOST) * self.pace:
            self.go_back()
        elif len(self.steps) == TRIAL:
            better = self.pace / statistics.median(counted)
            if better > (GAIN if more else 1.0):
                self.patience = PATIENCE
                self.keep(further=self.at + (1 if more else -1))
            else:
                self.go_back()

    def keep(self, further: int = 1) -> None:
        """The number in use is the best so far. The trial of the next one, `further`, begins."""
        self.best, self.pace = self.at, statistics.median(self.steps[1:])
        self.waited = 0
        self.try_at(further)

    def go_back(self) -> None:
        if self.at > self.best:
            self.patience *= 2
        self.waited = 0
        self.try_at(self.best)

    def try_more(self) -> None:
        self.waited = 0
        self.try_at(self.best + 1)

    def try_at(self, place: int) -> None:
        self.at = place if 0 <= place < len(self.counts) else self.best
        self.steps = []
        self.use(self.count)
