"""Train an image tokenizer on shards of pictures.

python tokenizers/train_image.py --config configs/tokenizers/demo_32px_16.yaml \
        --data.train [runs/shards/train] --data.held_out [runs/shards/held_out] --trainer.run_dir runs/image_tokenizer
    deepspeed tokenizers/train_image.py --config configs/tokenizers/vq16_256.yaml ...
"""

from mixmodal.cli import command
from mixmodal.training.image_tokenizer import ImageTokenizerTrainingConfig, train_image_tokenizer

if __name__ == "__main__":
    command(ImageTokenizerTrainingConfig, train_image_tokenizer)
