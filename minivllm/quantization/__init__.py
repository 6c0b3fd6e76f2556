"""How linear layers and the KV cache store their numbers. One file per method; none depends on families, adapters or ranks."""
