"""Evaluation: metrics, and tables and plots of them."""
