"""What happens at the server: checks of updates, aggregation, evaluation."""
