"""Tune a model on conversations.

deepspeed --num_gpus 8 train/finetune.py --config configs/train/finetune_chameleon.yaml --data.tokens DIR
python train/finetune.py --config configs/train/finetune_chameleon.yaml --data.tokens DIR
"""

from mixmodal.cli import command
from mixmodal.training.finetune import FinetuneConfig, finetune

if __name__ == "__main__":
    command(FinetuneConfig, finetune)
