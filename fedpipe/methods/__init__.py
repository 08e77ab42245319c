"""The catalogue: each published method as a composition of small parts."""

from fedpipe.methods.catalogue import CATALOGUE, Method, compose, warnings_for

__all__ = ["CATALOGUE", "Method", "compose", "warnings_for"]
