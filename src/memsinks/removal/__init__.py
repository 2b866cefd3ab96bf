"""Removal: settling, export, and the check in a fresh process."""
