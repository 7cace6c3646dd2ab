"""How every command ends: a UserError is a message and never a traceback; where several processes run it, alike.

Exit status: 0 done; 1 a bug; 2 a UserError, or a disk that cannot be written; 75 (INTERRUPTED) stopped by a signal with
everything saved; 76 (`hosts.LOST`) another process is gone, or did not come. After 75 and 76 the same command goes on.
"""

import os
import sys
import traceback
from collections.abc import Callable

from vdjax import hosts
from vdjax.errors import UserError
from vdjax.files import disk_problem

INTERRUPTED = 75


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its status; where several processes run it, all of them do."""
    try:
        status = main() or 0
        if not status:
            hosts.leave()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        hosts.end(error.status, str(error))
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("stopped by a signal", file=sys.stderr)
        hosts.end(INTERRUPTED, "stopped by a signal")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if problem := disk_problem(error):
            print(f"error: {problem}", file=sys.stderr, flush=True)
            hosts.end(2, problem)
            os._exit(2)  # at once: other saves that are under way fail too, each with tracebacks
        hosts.end(1, f"{type(error).__name__}: {error}"[:2000], traceback.format_exc())
        raise
    if status:
        hosts.end(status, "stopped by a signal" if status == INTERRUPTED else f"ended with status {status}")
    sys.exit(status)
