"""The inference engine: schedules requests into ragged batches and runs one forward pass a step."""
