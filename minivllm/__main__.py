"""`python -m minivllm` is `minivllm`."""
from __future__ import annotations

import sys

from minivllm.cli.main import main

if __name__ == "__main__":  # a spawned engine process imports this module under another name
    sys.exit(main())
