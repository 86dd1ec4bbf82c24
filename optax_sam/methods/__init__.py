"""The named methods: a file for each, with its equations, citation and defaults."""
