"""The recovery experiment: rank processes under load, faults done to them, and what must hold afterwards (``jaxmoe recover``)."""
