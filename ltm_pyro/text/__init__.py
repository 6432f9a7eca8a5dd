"""Generating and scoring text with a trained run; no text depends on the others of its batch."""
