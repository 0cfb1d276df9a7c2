"""Which shared memory is in use by what nobody has waited for."""

import numpy as np

from hopper_attention.simulator.hazards.checks import SharedAccess, SharedAccesses


def test_pieces_on_both_sides_of_an_access():
    accesses = SharedAccesses()
    read = SharedAccess(100, 200, False, None, "a WGMMA")
    accesses.add(read)
    around, into = np.array([0, 84, 200]), np.array([0, 85, 200])
    assert accesses.collision(0, 216, True) is read
    assert accesses.collision(0, 216, False) is None
    assert accesses.collision(0, 216, True, (around, 16)) is None
    assert accesses.collision(0, 216, True, (into, 16)) is read
    accesses.remove(read)
    accesses.add(SharedAccess(100, 200, True, None, "a bulk load"))
    assert accesses.collision(0, 216, False, (around, 16)) is None
    assert accesses.collision(0, 216, False, (into, 16)) is not None
