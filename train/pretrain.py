"""Pretrain a transformer on token shards.

deepspeed --num_gpus 8 train/pretrain.py --config configs/train/cm3leon_350m.yaml --data.tokens DIR
python train/pretrain.py --config configs/train/tiny.yaml --trainer.max_steps 100
"""

from mixmodal.cli import command
from mixmodal.training.pretrain import PretrainConfig, pretrain

if __name__ == "__main__":
    command(PretrainConfig, pretrain)
