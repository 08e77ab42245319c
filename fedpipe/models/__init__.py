"""The frozen backbone, its adapters, and what a task is."""
