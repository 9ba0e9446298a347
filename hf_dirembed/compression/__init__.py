"""Table → weights and metric → subspace → codes and decoder."""
