"""How a process starts: several hosts, compile cache, quiet libraries."""

import os
import signal
from pathlib import Path
from typing import Any

import jax


def start() -> None:
    """Call once, before anything touches a device.

    Joins the other hosts where the environment says that there are any, keeps compiled programs on disk
    (JAX_COMPILATION_CACHE_DIR, default ~/.cache/vdjax/compiled), and makes SIGTERM end the process as Ctrl-C does.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        jax.distributed.initialize()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "vdjax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def on_term(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, on_term)
