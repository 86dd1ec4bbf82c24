"""What the methods cost and gain: README.md lists the folders."""
