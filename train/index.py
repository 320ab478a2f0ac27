"""Build a memory that documents are retrieved from, of shards and the token shards made of them.

python train/index.py --shards '[runs/shards]' --tokens runs/tokens --encoder runs/encoder/export --out runs/memory
"""

from mixmodal.cli import command
from mixmodal.data.indexing import MemoryConfig, build_memory

if __name__ == "__main__":
    command(MemoryConfig, build_memory)
