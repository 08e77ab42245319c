"""The catalogue: each published method as a composition of small parts."""

from fedpipe.methods.catalogue import CATALOGUE, Method, compose

__all__ = ["CATALOGUE", "Method", "compose"]
