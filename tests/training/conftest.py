"""The tiny model that several tests of runs share, and catalogues whose rows are not really learned."""

from tests.support.catalogues import pretended
from tests.support.runs import model

__all__ = ["model", "pretended"]
