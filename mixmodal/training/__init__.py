"""What is trained, and how: tasks, the trainer, and the only import of deepspeed (`engine.py`)."""
