"""Turn corpora into validated shards, and into token shards once there are tokenizers.

python train/prepare.py --config configs/data/folder.yaml --out runs/pictures
"""

from mixmodal.cli import command
from mixmodal.data.corpora import PrepareConfig, prepare

if __name__ == "__main__":
    command(PrepareConfig, prepare)
