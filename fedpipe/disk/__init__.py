"""How much disk a run will use, predicted before it begins, and refused where it does not fit.

`rehearsal` plays two rounds of the method on one small made-up layer, without records or a backbone,
and reads off how large the tensors of a round are; `needs` adds up what a whole run leaves behind, and
`room` holds that against what is free. Nothing here is used by what computes.
"""

from fedpipe.disk.needs import Needs, needs_of
from fedpipe.disk.room import check_room, missing_room

__all__ = ["Needs", "check_room", "missing_room", "needs_of"]
