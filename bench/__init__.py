"""One harness that gives every engine the same work, and the scripts behind single decisions. Run from the repository root."""
