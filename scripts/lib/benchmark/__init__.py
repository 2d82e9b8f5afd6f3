"""The parts of benchmark.py: what is measured, a module for each subcommand; its targets; its page."""
