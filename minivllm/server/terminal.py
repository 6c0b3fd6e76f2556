"""What commands print: status lines and the log, both on stderr."""
from __future__ import annotations

import logging
import sys


def print_status(message: str) -> None:
    """Print a line for the user at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


def configure_logging(level: str) -> None:
    """Send log lines to stderr. Commands call this; imports do not."""
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for verbose in ("httpx", "httpx2", "filelock", "urllib3", "asyncio", "uvicorn.error"):
        logging.getLogger(verbose).setLevel("DEBUG" if level == "debug" else "ERROR" if level == "error" else "WARNING")
    logging.getLogger("numba").setLevel("ERROR" if level == "error" else "WARNING")  # at "debug" it logs each compiled instruction
