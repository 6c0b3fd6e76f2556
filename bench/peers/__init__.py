"""One adapter per engine: `Engine(job)` loads, `generate(requests)` answers with token ids. Only engines that were seen to work."""
