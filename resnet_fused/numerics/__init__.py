"""How exact every operator is on this machine, beside eager PyTorch and against float64."""

from .draw import DTYPES
from .measure import Row, Variant, measure
from .report import HEADER, cells, markdown, summary
from .variants import every

__all__ = ["DTYPES", "HEADER", "Row", "Variant", "cells", "every", "markdown", "measure", "summary"]
