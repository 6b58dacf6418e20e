"""Which layout pays on which GPUs."""
