"""`python -m minivllm.entrypoints.openai.run_batch -i IN -o OUT --model MODEL`: the same as `minivllm run-batch`."""
from __future__ import annotations

import sys
from collections.abc import Sequence

from minivllm.cli.main import main as run


def main(argv: Sequence[str] | None = None) -> int:
    return run(["run-batch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
