"""Corpora, shards and the batches that training reads."""
