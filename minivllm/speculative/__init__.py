"""Speculative decoding: proposers of drafts. See docs/speculation.md."""
