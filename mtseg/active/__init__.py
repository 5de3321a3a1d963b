"""Active learning: rounds, candidates, strategies, annotators' files, simulation."""
