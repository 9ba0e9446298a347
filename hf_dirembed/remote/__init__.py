"""What travels with a compressed model: five files that import one another and nothing else of the package."""
