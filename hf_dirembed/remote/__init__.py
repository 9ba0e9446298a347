"""What travels with a compressed model: files that import one another and nothing else of the package."""
