"""The parts of a decoder layer. Each is built from a `BuildContext` and its weights, and called with its inputs only."""
