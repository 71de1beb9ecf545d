"""The tiny model that several tests of runs share."""

from tests.support.runs import model

__all__ = ["model"]
