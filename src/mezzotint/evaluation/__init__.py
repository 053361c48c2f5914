"""How far a model is from another: perplexity, divergence and tasks, with what two models can be told apart by."""

from mezzotint.evaluation.divergence import Divergence, Evaluation, WindowSums
from mezzotint.evaluation.intervals import Difference, difference, standard_error

__all__ = ["Difference", "Divergence", "Evaluation", "WindowSums", "difference", "standard_error"]
