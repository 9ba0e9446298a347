"""Token embeddings 8 to 32 times smaller, behind plain `from_pretrained`."""
