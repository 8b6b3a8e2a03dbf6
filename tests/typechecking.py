"""The checker that ``conftest`` puts on every annotated function of the packages."""

from beartype import BeartypeConf, beartype

# The numeric tower: an int is welcome where a float is annotated, as everywhere in Python.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
