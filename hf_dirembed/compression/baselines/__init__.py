"""The paper's methods, and the one that they are compared with: latents that are floats."""
