"""Workloads, statistics, and the load generator and offline runs of `minivllm bench`. Knows servers only by their sockets."""
