"""Training and kNN accuracy of the small teachers that ship in `teachers/small/`."""
