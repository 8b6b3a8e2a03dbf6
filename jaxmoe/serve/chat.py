"""``jaxmoe.chat`` under the name it had before training needed it too."""

from jaxmoe.chat import *  # noqa: F403
from jaxmoe.chat import __all__ as __all__
