"""Removal: settling, export, and the check in a fresh process; tombstones and the record of a take-down."""
