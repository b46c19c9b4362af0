"""The inference engine: requests are scheduled into ragged batches, one forward pass a step."""
