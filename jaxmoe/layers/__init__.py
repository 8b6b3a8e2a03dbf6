"""Building blocks of the model, as pure functions on parameter dicts."""
