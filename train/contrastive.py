"""Train a two-tower encoder of texts and pictures on captioned shards, for retrieval.

python train/contrastive.py --config configs/train/demo_encoder.yaml --data.train '[runs/shards/train]'
deepspeed --num_gpus 8 train/contrastive.py --config configs/train/demo_encoder.yaml ...
"""

from mixmodal.cli import command
from mixmodal.training.contrastive import EncoderTrainingConfig, train_encoder

if __name__ == "__main__":
    command(EncoderTrainingConfig, train_encoder)
