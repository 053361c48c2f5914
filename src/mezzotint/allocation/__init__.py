"""Which grid each linear gets, so that the predicted loss is smallest within a size or a time."""

from mezzotint.allocation.budget import allocate, frontier
from mezzotint.allocation.exact import allocate_exact
from mezzotint.allocation.fusion import fused_alternatives
from mezzotint.allocation.items import Allocation, Choice, Item, Part, Parts
from mezzotint.allocation.water import reverse_water_filling

__all__ = [
    "Allocation",
    "Choice",
    "Item",
    "Part",
    "Parts",
    "allocate",
    "allocate_exact",
    "frontier",
    "fused_alternatives",
    "reverse_water_filling",
]
