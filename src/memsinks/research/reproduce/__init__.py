"""The paper's controlled study, rerun: a file a figure."""
