"""Ways to unlearn concepts, all with one interface, to be compared in one table."""
