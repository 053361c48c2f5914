"""How far a model is from another: perplexity and divergence, accumulated from chunks of logits."""

from mezzotint.evaluation.divergence import Divergence, Evaluation, chunks, standard_error

__all__ = ["Divergence", "Evaluation", "chunks", "standard_error"]
