"""Runs: a YAML recipe, its corpus, its run folder, its estimate, and the demo."""
