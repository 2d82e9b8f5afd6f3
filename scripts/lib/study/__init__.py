"""The parts of study.py: the grid of trainings, one of them, the tasks of recall, and the page."""
