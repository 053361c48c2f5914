"""For tests of this package and of stages written elsewhere: problems, Hypothesis strategies and contract helpers."""
