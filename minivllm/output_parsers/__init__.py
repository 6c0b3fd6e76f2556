"""Parsers of a model's output: reasoning, content and tool calls, while the text arrives."""
