"""Retrieval: encoders of documents, the memory of their vectors, and which documents are taken from it."""
