"""How far a model is from another: perplexity and divergence, accumulated from chunks of logits."""

from mezzotint.evaluation.divergence import Divergence, Evaluation, chunks

__all__ = ["Divergence", "Evaluation", "chunks"]
