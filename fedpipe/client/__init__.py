"""What happens at the clients: schedules, per-record gradients, clipping, the private step, optimisers."""
