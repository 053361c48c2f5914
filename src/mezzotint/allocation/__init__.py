"""Which grid each linear gets, so that the predicted loss is smallest within a size or a time."""

from mezzotint.allocation.budget import allocate, frontier
from mezzotint.allocation.items import Allocation, Choice, Item

__all__ = ["Allocation", "Choice", "Item", "allocate", "frontier"]
