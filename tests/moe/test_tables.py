"""Placement tables."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.moe import ExpertTables, identity_tables
from jaxmoe.moe.tables import slots_of


def test_identity_tables_put_expert_e_in_slot_e():
    ids = jnp.asarray([[3, 0], [-1, 2]], jnp.int32)
    np.testing.assert_array_equal(slots_of(identity_tables(4), ids), ids)


def test_copies_take_turns_by_token():
    tables = ExpertTables.from_slots(np.asarray([0, 1, 0, -1]), 2, max_copies=3)
    np.testing.assert_array_equal(tables.expert_slots, [[0, 2, -1], [1, -1, -1]])
    np.testing.assert_array_equal(tables.copies, [2, 1])
    ids = jnp.asarray([[0], [0], [0], [1]], jnp.int32)
    np.testing.assert_array_equal(slots_of(tables, ids), [[0], [2], [0], [1]])


@given(st.permutations([0, 0, 0, 1, 2, 2, 3, -1, -1]))
def test_every_choice_goes_to_a_slot_that_holds_its_expert(slot_expert):
    tables = ExpertTables.from_slots(np.asarray(slot_expert), 4, max_copies=3)
    ids = jnp.asarray([[e] for e in (0, 1, 2, 3, 0, 0, 2, -1)], jnp.int32)
    slots = np.asarray(slots_of(tables, ids))
    assert slots[7, 0] == -1
    assert [slot_expert[s] for s in slots[:7, 0]] == ids[:7, 0].tolist()


def test_an_expert_without_a_slot_is_named():
    with pytest.raises(ValueError, match=r"must hold every expert; missing \[1, 3\]. Give each"):
        ExpertTables.from_slots(np.asarray([0, 2, -1]), 4)


def test_more_copies_than_max_copies_raise():
    with pytest.raises(ValueError, match="has 3 copies but max_copies is 2; raise max_copies"):
        ExpertTables.from_slots(np.asarray([0, 0, 0]), 1, max_copies=2)
