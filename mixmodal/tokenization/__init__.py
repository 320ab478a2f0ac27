"""Text and pictures to token indices and back."""
