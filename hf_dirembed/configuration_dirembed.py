"""What is on disk, and the errors that bad input ends in."""


class DirEmbedError(ValueError):
    """Base of every error that hf_dirembed raises on bad input; each message names the mend."""


class SpecError(DirEmbedError):
    """The `dirembed` object of a config is missing, malformed, or does not fit the model."""


class CheckpointError(DirEmbedError):
    """A checkpoint's tensors do not fit its config."""


class ModelError(DirEmbedError):
    """The model cannot be compressed or expanded: it has no token embedding, or is compressed already."""


class TableError(DirEmbedError):
    """The embedding table cannot be compressed: wrong shape, NaN or infinity."""


class BudgetError(DirEmbedError):
    """The asked budget (bits, ratio or rank) or a method's setting cannot be met."""
