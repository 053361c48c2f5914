"""Comparing two models: perplexity, KL divergence and tasks, with confidence intervals."""

from mezzotint.evaluation.divergence import Divergence, Evaluation, WindowSums
from mezzotint.evaluation.intervals import Difference, difference, standard_error

__all__ = ["Difference", "Divergence", "Evaluation", "WindowSums", "difference", "standard_error"]
