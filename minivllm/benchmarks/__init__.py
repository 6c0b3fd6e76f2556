"""Workloads, statistics, and the runs of `minivllm bench`: a load generator for servers, and offline runs of the engine."""
