"""`minivllm list`: the models on this machine's disk."""
from __future__ import annotations

import argparse
from datetime import datetime
from typing import Any


def add_parser(commands: Any) -> None:
    commands.add_parser("list", help="list the downloaded and converted models",
                        description="List the downloaded and converted models, with their sizes. `minivllm rm NAME` removes one.")


def run(args: argparse.Namespace) -> int:
    from minivllm.models.cache import cache_dir, entries

    found = entries()
    width = max([len("NAME"), *(len(entry.name) for entry in found)]) + 2
    print(f"{'NAME':<{width}}{'KIND':<11}{'SIZE':>11}  CHANGED")
    for entry in found:
        changed = datetime.fromtimestamp(entry.modified).strftime("%Y-%m-%d %H:%M")
        print(f"{entry.name:<{width}}{entry.kind:<11}{readable(entry.size):>11}  {changed}")
    print(f"{'total':<{width}}{'':<11}{readable(sum(entry.size for entry in found)):>11}")
    print(f"hub: huggingface_hub's cache; download, converted: {cache_dir()}")
    return 0


def readable(size: int) -> str:
    """Bytes in the unit that fits."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
