"""Active learning in rounds: what to annotate next, the annotator's files, and simulations of it; no leaf knows it."""
