"""Exceptions a caller may want to catch; plain misuse raises ValueError or TypeError instead."""


class JaxMoeError(Exception):
    """Base class of every jaxmoe-specific error."""


class CheckpointCorrupt(JaxMoeError):
    """A checkpoint file is missing, truncated or altered; the message names the file."""


class CheckpointMismatch(JaxMoeError):
    """A checkpoint's tensors do not fit the model; the message lists names with both shapes."""
