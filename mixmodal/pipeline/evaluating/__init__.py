"""The tasks of the evaluate command: each says what is asked of a model, and what the answers add up to."""
