"""The run-time checker of annotations that the tests put on all of kvfold.

It is beartype, told that an int may stand where a float is asked for, as every type checker has it.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
