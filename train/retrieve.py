"""Find the documents that may be retrieved for each document of token shards, before training.

python train/retrieve.py --memory runs/memory --shards '[runs/shards]' --tokens runs/tokens --out runs/candidates
"""

from mixmodal.cli import command
from mixmodal.data.retrieving import RetrieveConfig, retrieve

if __name__ == "__main__":
    command(RetrieveConfig, retrieve)
