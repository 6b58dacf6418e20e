"""One stage's models over several processes, one GPU each: the only importer of `torch.distributed`."""
