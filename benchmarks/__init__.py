"""Measures the cost and the gain of the methods; README.md lists the folders."""
