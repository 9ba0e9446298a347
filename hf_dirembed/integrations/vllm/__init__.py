"""Compressed models in vLLM: its entry point `vllm.general_plugins` calls `register` in each of its processes."""

from __future__ import annotations

import logging


logger = logging.getLogger("vllm.plugins.hf_dirembed")  # below vLLM's own, which is shown


def register() -> None:
    """Makes `vllm serve` and `vllm.LLM` take compressed models; models of others are left alone.

    It may be called more than once, and never raises: that would stop every start of vLLM on the machine. Where vLLM
    is not what this was written for, it says so in a line.

    Example:
        >>> register()  # without vLLM
    """
    try:
        from vllm import __version__ as version
    except Exception as error:  # whatever a broken installation raises
        logger.debug("hf_dirembed: vLLM cannot be imported (%s)", error)
        return
    try:
        from .hooks import install

        install()
    except Exception as error:  # of any kind: vLLM's insides may have become anything
        logger.warning(
            "hf_dirembed does not know this vLLM, %s (%s: %s): compressed models will not load in it; expand them "
            "with hf-dirembed expand, or install a vLLM that docs/serving.md names",
            version,
            type(error).__name__,
            error,
        )
