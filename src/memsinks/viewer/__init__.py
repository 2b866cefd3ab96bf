"""A local page on a run: what its models write, whose sinks are open, and taking one owner out."""
