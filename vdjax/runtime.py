"""How a process starts: several hosts, compile cache, quiet libraries."""

import argparse
import hashlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax

from vdjax import cluster, hosts


def start(flags: argparse.Namespace | None = None) -> None:
    """Call once, before anything touches a device.

    Joins the other processes where flags or the environment say that there are any (`vdjax.cluster`) and checks that
    all run the same code; keeps compiled programs on disk (JAX_COMPILATION_CACHE_DIR, default
    ~/.cache/vdjax/compiled); and makes SIGTERM end the process as Ctrl-C does.

    Args:
      flags: of a command that has those of `cluster.add_flags`. Such a command compares its config between processes
        itself (`hosts.agree`); of others the command lines are compared here.

    Raises:
      UserError: processes that do not come, or differ; names them.
    """
    place = cluster.find(flags, os.environ)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "vdjax" / "compiled"))
    # JAX keeps those that took a second; an experiment has a score that take less, on a tiny model 3 s in all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax's threads log is raised where they are waited for

    def on_term(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    def on_unraisable(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":  # tensorstore's, of each write beside one that failed
            sys.__unraisablehook__(what)

    signal.signal(signal.SIGTERM, on_term)
    sys.unraisablehook = on_unraisable
    if place:
        from vdjax import runs

        cluster.join(place)
        hosts.agree("the code", {**runs.versions(), "files of vdjax": files_hash(Path(__file__).parent)})
        if flags is None:
            hosts.agree("the command line", {"arguments": sys.argv[1:]})


def files_hash(folder: Path) -> str:
    """Of the names and contents of all files of a package."""
    whole = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts):
        for part in (str(file.relative_to(folder)).encode(), file.read_bytes()):
            whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]
