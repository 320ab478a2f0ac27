"""A web page over `MixedModal`: chat with pictures, and editing. Only `layout` and `server` know gradio."""
