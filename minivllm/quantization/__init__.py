"""How linear layers and the KV cache store their numbers. One file per method; no method knows families, adapters or ranks."""
