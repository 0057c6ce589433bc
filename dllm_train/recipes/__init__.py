"""Training recipes: each module runs as one command."""
