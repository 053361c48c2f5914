"""Running packed weights where other programs load them."""
