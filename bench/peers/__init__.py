"""One adapter per engine: `Engine(job)` loads a model, `generate(requests)` returns token ids. Each was seen to work."""
