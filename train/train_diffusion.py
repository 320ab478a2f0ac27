"""Train a denoiser that is told classes or texts on captioned shards, to classify pictures by likelihood.

python train/train_diffusion.py --config configs/train/demo_diffusion.yaml --data.train '[runs/shards/train]'
deepspeed --num_gpus 8 train/train_diffusion.py --config configs/train/demo_diffusion.yaml ...
"""

from mixmodal.cli import command
from mixmodal.training.diffusion import DiffusionTrainingConfig, train_diffusion

if __name__ == "__main__":
    command(DiffusionTrainingConfig, train_diffusion)
