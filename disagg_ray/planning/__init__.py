"""Which layout pays on which GPUs: measured profiles in, predicted seconds, memory and throughput out."""
