"""Models: find one (hub), read its weights (loader, gguf), run it (decoder)."""
