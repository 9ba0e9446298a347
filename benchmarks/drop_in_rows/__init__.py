"""The rows of drop_in.py: each does one thing that people do with a model, and says what came of it."""

# In the order in which they are run.
from . import loading, pipelines, training, adapting, generation, tables, exporting, placement, hub  # noqa: F401, I001
