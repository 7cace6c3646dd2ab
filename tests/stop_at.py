"""Runs `python -m vdjax.main` and stops itself: python stop_at.py HOW STAGE STEP [arguments of vdjax.main]

KILL: SIGKILL once the step is logged. TERM: SIGTERM there, which vdjax.main answers. STOP: SIGSTOP there, as if hung.
FAIL: an error there. SAVE: SIGKILL while the step's snapshot or resume point is being written. FULL: from there on the
disk is full for files of more than 20 kB, which snapshots have. RUN: none of these.
"""

import os
import resource
import signal
import sys
from typing import Any

import experiments

from vdjax import cli, hosts, main, snapshots
from vdjax.errors import UserError
from vdjax.train import loop

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}


def arm(how: str, stage: str, at: int) -> None:
    log_step, save_resume = loop.MetricsLog.step, snapshots.save_resume

    def step(self: loop.MetricsLog, step: int, values: dict[str, float]) -> None:
        log_step(self, step, values)
        if (self.name, step) == (stage, at):
            if how in SIGNALS:
                os.kill(os.getpid(), SIGNALS[how])
            if how == "FULL":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            if how == "FAIL":
                raise UserError("the disk is full")

    def save(manager: Any, step: int, state: Any, position: dict) -> None:
        save_resume(manager, step, state, position)
        if (manager.directory.parent.name, step) == (stage, at) and how == "SAVE":
            os.kill(os.getpid(), signal.SIGKILL)

    experiments.leave_out(setattr)
    loop.MetricsLog.step = step
    snapshots.save_resume = save


if __name__ == "__main__":
    how, stage, at = sys.argv[1:4]
    sys.argv = ["main", *sys.argv[4:]]
    hosts.HEARTBEAT_S = int(os.environ.get("HEARTBEAT_S", hosts.HEARTBEAT_S))
    arm(how, stage, int(at))
    cli.run_cli(main.main)
