"""The whole chain on demo pictures."""
