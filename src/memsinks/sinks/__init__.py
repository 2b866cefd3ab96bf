"""The mechanism: sinks beside the MLPs of any decoder, what opens them, and what they let through."""
