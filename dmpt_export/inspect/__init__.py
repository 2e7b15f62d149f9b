"""Summaries of models and graphs."""
