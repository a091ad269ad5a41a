"""One module per group of routes: each parses, calls, returns."""
