"""Text and model → what errors of a table cost: token weights, and the Hessian."""
