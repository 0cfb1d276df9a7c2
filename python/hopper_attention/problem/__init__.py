"""The arguments of a call as values, and their checks."""
