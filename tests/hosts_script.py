"""What `vdjax.hosts` does between real processes that use no device: python hosts_script.py PORT PROCESSES PROCESS DIR

Prints a JSON object of what came of each call.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdjax import cluster, hosts
from vdjax.errors import UserError


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    port, processes, process = map(int, sys.argv[1:4])
    folder = Path(sys.argv[4])
    hosts.PATIENCE_S = 0.5
    cluster.join(cluster.Place(f"127.0.0.1:{port}", processes, process))
    big = "x" * (3 * hosts.PART + 1)
    out: dict[str, Any] = {
        "gathered": hosts.gather("numbers", process * 1.1),
        "first": hosts.by_first("a number", lambda: [process, 0.1 + 0.2, None]),
        "big": hosts.by_first("a long text", lambda: big) == big,
        "same": refusal(lambda: hosts.agree("the facts", {"a": 1, "b": [1, 2]})),
        "odd": refusal(lambda: hosts.agree("the facts", {"a": 1, "b": "x" if process == 1 else "y"})),
        "missing": refusal(lambda: hosts.agree("the facts", {"a": 1} | ({"c": 2} if process == 1 else {}))),
        "shared": refusal(lambda: hosts.check_shared(folder / "shared")),
    }
    hosts.SHARED_S = 0.1
    out["not_shared"] = refusal(lambda: hosts.check_shared(folder / str(min(process, 1))))
    if process == 1:
        time.sleep(1.5)  # the others say whom they wait for
    hosts.barrier("a slow one")
    if process == 1:
        out["late"] = refusal(lambda: hosts.barrier("something else", 5))
    else:
        out["late"] = refusal(lambda: hosts.barrier("one that never comes", 2))
    out["after"] = hosts.gather("the end", process)
    print(json.dumps(out), flush=True)
    hosts.leave()
