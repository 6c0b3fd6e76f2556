"""Find a model (hub), read its weights (loader, gguf), run it (decoder)."""
