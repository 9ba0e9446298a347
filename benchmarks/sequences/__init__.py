"""Random sequences of what people do with a model, of a compressed one and of the dense one that it stands for."""
