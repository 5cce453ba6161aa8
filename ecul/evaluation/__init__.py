"""Protocols and metrics of the field."""

from ecul.evaluation.metrics import eval_llcm, eval_regdb, eval_sysu
from ecul.evaluation.protocols import Results, average, evaluate

__all__ = ["Results", "average", "eval_llcm", "eval_regdb", "eval_sysu", "evaluate"]
