"""Commands for the maintainers: pages, weights, plans."""
