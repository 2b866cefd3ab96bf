"""Research: rivals, comparisons, and the paper's study. Nothing above imports it."""
