"""Training: one loop, the optimizer, sinks first, and the Hugging Face Trainer."""
